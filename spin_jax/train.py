"""The training loop of one stage: batches in a fixed order, metrics a step late, checkpoints, a clean stop."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from etils import epath
from tqdm import tqdm

from spin_jax.batches import HostBatch
from spin_jax.checkpoint import Checkpoints, abstract_like
from spin_jax.errors import UserError
from spin_jax.metrics import MetricsWriter
from spin_jax.step import TrainState


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, as a preempted machine gets, or Ctrl-C) and has saved its state."""


def fit(
    step_fn: Callable,
    state: TrainState,
    opponent: dict | None,
    *,
    steps: int,
    make_batch: Callable[[int], HostBatch],
    sharding: jax.sharding.NamedSharding,
    passes: int,
    schedule: Callable[[int], float],
    directory: epath.Path,
    checkpoint_every: int,
    name: str,
) -> TrainState:
    """Train until `steps`, from the newest checkpoint under `directory` if there is one.

    The state after step s is a function of the initial state, of s and of nothing else, so that an interrupted run
    ends as an uninterrupted one. Metrics of step s are read after step s + 1 has been dispatched: the device never
    waits for them.

    Args:
        step_fn: the jitted (state, opponent, batch) -> (state, metrics), state donated.
        state: at step 0; donated.
        opponent: params for a live opponent, else None.
        steps: optimizer steps in all.
        make_batch: the batch of a step; pure.
        sharding: of a batch's leading axis.
        passes: forward passes that a step's FLOPs count as: 3 for forward and backward, 4 with a live opponent.
        schedule: the learning rate at a step, for the log.
        directory: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
        checkpoint_every: steps.
        name: for the progress bar.

    Raises:
        Stopped: after SIGTERM or SIGINT, with a checkpoint of the last step made.
        UserError: a loss or gradient was not finite; the message names the file with the step's rows, and the last
            good state is saved.
    """
    with (
        Checkpoints(directory / "checkpoints") as checkpoints,
        MetricsWriter(directory, resume_step=checkpoints.latest_step() or 0) as writer,
        tqdm(total=steps, initial=checkpoints.latest_step() or 0, desc=name, unit="step") as bar,
        _StopSignal() as stop,
    ):
        start = checkpoints.latest_step() or 0
        if start:
            try:
                state = checkpoints.restore(start, abstract_like(state))
            except (OSError, ValueError, KeyError) as error:
                damaged = directory / "checkpoints" / str(start)
                why = str(error).splitlines()[0]
                raise UserError(
                    f"{damaged} cannot be read ({why}): delete it, and the run goes on from the one before"
                ) from error
        log = _StepLog(writer, bar, schedule, passes)
        for step, batch, arrays in _prefetched(make_batch, sharding, start, steps):
            state, metrics = step_fn(state, opponent, arrays)
            healthy = log.read_previous_and_keep(step, batch, metrics)
            if (step + 1) % checkpoint_every == 0 and step + 1 < steps and log.read_kept():
                writer.flush()  # a checkpoint never knows more steps than metrics.jsonl
                checkpoints.save(step + 1, state)
            if stop.asked or not healthy:
                break
        healthy = log.read_kept() and healthy if start < steps else True
        if not healthy:
            _refuse_to_go_on(log, state, checkpoints, directory)
        writer.flush()
        reached = int(state.step)
        checkpoints.save(reached, state, wait=True)
        if reached < steps:
            raise Stopped(f"stopped after step {reached} of {steps}; start the same command again to go on")
    return state


def _prefetched(make_batch, sharding, start: int, steps: int) -> Iterator[tuple[int, HostBatch, NamedTuple]]:
    """Batches one ahead: the next is made and on its way while the device works on this one."""
    pending = None
    for step in range(start, steps):
        batch = make_batch(step)
        ready = (step, batch, jax.device_put(batch.arrays, sharding))
        if pending is not None:
            yield pending
        pending = ready
    if pending is not None:
        yield pending


class _StepLog:
    """Reads each step's metrics after the next step has been dispatched, so that the device always has work."""

    def __init__(self, writer: MetricsWriter, bar: tqdm, schedule: Callable[[int], float], passes: int):
        self._writer, self._bar, self._schedule, self._passes = writer, bar, schedule, passes
        self._kept = None
        self._last_read = time.perf_counter()
        self.unhealthy: dict | None = None  # what is known of the first step that was not finite

    def read_previous_and_keep(self, step: int, batch: HostBatch, metrics: dict[str, jax.Array]) -> bool:
        """Read the step before; returns whether it was finite."""
        healthy = self.read_kept()
        self._kept = (step, batch, metrics)
        return healthy

    def read_kept(self) -> bool:
        """Wait for the step kept last and log it; returns whether all was finite so far."""
        if self._kept is None or self.unhealthy:
            return not self.unhealthy
        (step, batch, metrics), self._kept = self._kept, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        healthy = values.pop("healthy")
        seconds = time.perf_counter() - self._last_read
        self._last_read += seconds
        rates = {
            "tokens_per_second": batch.tokens / seconds,
            "model_tflops_per_second": self._passes * batch.flops / seconds / 1e12,
        }
        self._writer.write(step + 1, values | batch.facts | {"learning_rate": float(self._schedule(step))} | rates)
        self._bar.update(1)
        self._bar.set_postfix({short: f"{values[name]:.4g}" for short, name in _SHOWN.items() if name in values})
        if not healthy:
            self.unhealthy = {"step": step + 1, "rows": batch.rows.tolist(), "loss": str(values["loss"])}
            self.unhealthy["grad_norm"] = str(values["grad_norm"])
        return bool(healthy)


_SHOWN = {"loss": "loss", "margin": "rewards/margin", "accuracy": "rewards/accuracy"}


def _refuse_to_go_on(log: _StepLog, state: TrainState, checkpoints: Checkpoints, directory: epath.Path) -> None:
    """Save the last good state and say which rows the run stopped at."""
    report = directory / "not_finite.json"
    report.write_text(json.dumps(log.unhealthy, indent=1) + "\n")
    good = int(state.step)
    checkpoints.save(good, state._replace(healthy=~state.healthy), wait=True)
    raise UserError(
        f"step {log.unhealthy['step']}: loss {log.unhealthy['loss']}, gradient norm {log.unhealthy['grad_norm']}: "
        f"not finite; its rows are in {report} and the state after step {good} is saved. To train the iteration anew, "
        f"delete {directory / 'checkpoints'} and lower config.train.learning_rate or config.spin.beta"
    )


class _StopSignal:
    """Turns SIGTERM and SIGINT into a flag while a stage runs, so that it can save first. A second Ctrl-C stops at
    once."""

    def __enter__(self) -> "_StopSignal":
        self.asked = False
        self._previous = {}
        try:
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread (a notebook's executor): signals stay with whoever has them
            pass
        return self

    def _ask(self, number: int, frame) -> None:
        del frame
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nstopping after this step, with everything saved\n")  # a handler must not touch Python's buffers

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
