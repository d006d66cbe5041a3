"""The training loop of one stage: batches in a fixed order, metrics a step late, checkpoints, a clean stop."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from etils import epath

from spin_jax.checkpoints.train_state import Checkpoints
from spin_jax.data.batch import HostBatch
from spin_jax.devices.transfer import everywhere, to_devices
from spin_jax.errors import UserError
from spin_jax.runtime import multihost, preemption
from spin_jax.runtime.files import write_whole
from spin_jax.runtime.metric_writer import MetricsWriter
from spin_jax.runtime.preemption import Stopped
from spin_jax.runtime.progress import Loop
from spin_jax.training.train_step import TrainState


class LoopSpec(NamedTuple):
    """What a training loop is told beside its step and its batches.

    Attributes:
        name: where its progress is shown.
        steps: optimizer steps in all.
        directory: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`, the last two from process zero.
        checkpoint_every: steps.
        sharding: of a batch's leading axis.
        schedule: steps -> their learning rates, for the log.
        flops_multiplier: see `programs.TrainingSpec`.
        start_loss: (l(0), how far from it the first step's loss may be); None: whatever it is.
    """

    name: str
    steps: int
    directory: epath.Path
    checkpoint_every: int
    sharding: jax.sharding.NamedSharding
    schedule: optax.Schedule
    flops_multiplier: int
    start_loss: tuple[float, float] | None = None


def fit(
    step_fn: Callable, state: TrainState, opponent: dict | None, make_batch: Callable[[int], HostBatch], spec: LoopSpec
) -> TrainState:
    """Train until `spec.steps`, from the newest checkpoint under `spec.directory` if there is one.

    The state after step s is a function of the initial state, of s and of nothing else, so that an interrupted run
    ends as an uninterrupted one. Metrics of step s are read after step s + 1 has been dispatched: the device never
    waits for them.

    Several processes stop after the same step, whichever of them got the signal: that it came travels with the metrics
    and is read as late as they are, so that no step waits for it.

    Args:
        step_fn: the jitted `train_step.make_step`, state donated.
        state: at step 0; donated.
        opponent: frozen params, of a live opponent or under low-rank updates, else None.
        make_batch: the batch of a step; pure, and the same on all processes.

    Raises:
        Stopped: after SIGTERM or SIGINT, with a checkpoint of the last step made.
        UserError: the first loss is not l(0), so that policy and opponent are not the same function; or a loss or
            gradient was not finite: the message names the file with the step's rows, and the last good state is saved.
    """
    several, scoring = multihost.are_several(), everywhere(False, spec.sharding.mesh)
    with (
        preemption.deferred(),
        Checkpoints(spec.directory / "checkpoints") as checkpoints,
        contextlib.nullcontext(checkpoints.restore_newest(state)) as (state, start),
        _StepLog(spec, start) as log,
    ):
        for step, batch, arrays in _prefetched(make_batch, spec.sharding, start, spec.steps):
            state, metrics, _ = step_fn(state, opponent, arrays, scoring)
            if several:
                metrics |= {"stop": multihost.any_process(preemption.asked())}
            healthy = log.read_previous_and_keep(step, batch, metrics)
            if (step + 1) % spec.checkpoint_every == 0 and step + 1 < spec.steps and log.read_kept():
                log.flush()  # a checkpoint never knows more steps than metrics.jsonl
                checkpoints.save(step + 1, state)
            if not healthy or (log.stop if several else preemption.asked()):
                break
        log.read_kept()
        if log.unhealthy:
            _refuse_to_go_on(log.unhealthy, log.learning_rates, state, checkpoints, spec.directory)
        log.flush()
        reached = int(state.step)
        checkpoints.save(reached, state, wait=True)
        if reached < spec.steps or (log.stop if several else preemption.asked()):
            raise Stopped(f"stopped after step {reached} of {spec.steps}; start the same command again to go on")
    return state


def _prefetched(make_batch, sharding, start: int, steps: int) -> Iterator[tuple[int, HostBatch, NamedTuple]]:
    """Batches one ahead: the next is made and on its way while the device works on this one."""
    pending = None
    for step in range(start, steps):
        batch = make_batch(step)
        ready = (step, batch, to_devices(batch.arrays, sharding))
        if pending is not None:
            yield pending
        pending = ready
    if pending is not None:
        yield pending


class _StepLog:
    """Reads each step's metrics after the next step has been dispatched, so that the device always has work. All
    processes read them; the first one writes and shows them."""

    def __init__(self, spec: LoopSpec, start: int):
        self._spec = spec
        self._writer = MetricsWriter(spec.directory, resume_step=start) if multihost.is_first() else None
        self._loop = Loop(spec.name, spec.steps, "step", start)
        # All at once and now: a sum between two steps would wait for the one that the device is at.
        self.learning_rates = np.asarray(spec.schedule(np.arange(spec.steps)))
        self._kept = None
        self._last_read = time.perf_counter()
        self.unhealthy: dict | None = None  # what is known of the first step that was not finite
        self.stop = False  # whether some process had been asked to stop when the last step read was dispatched

    def __enter__(self) -> "_StepLog":
        self._loop.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._loop.__exit__(*exception)
        if self._writer:
            self._writer.close()

    def flush(self) -> None:
        """Makes the steps read so far outlive this process."""
        if self._writer:
            self._writer.flush()

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
        self.stop = bool(values.pop("stop", False))
        if step == 0 and healthy and self._spec.start_loss:
            # With an NLL term, which starts anywhere, the objective's own part.
            _check_start(values.get("loss/objective", values["loss"]), *self._spec.start_loss)
        seconds = time.perf_counter() - self._last_read
        self._last_read += seconds
        rates = {
            "seconds": seconds,
            "tokens_per_second": batch.tokens / seconds,
            "model_tflops_per_second": self._spec.flops_multiplier * batch.flops / seconds / 1e12,
        }
        if self._writer:
            row = values | batch.host_metrics | {"learning_rate": float(self.learning_rates[step])} | rates
            self._writer.write(step + 1, row)
        self._loop.advance(1, **{short: f"{values[name]:.4g}" for short, name in _SHOWN.items() if name in values})
        if not healthy:
            self.unhealthy = {"step": step + 1, "rows": batch.rows.tolist(), "loss": str(values["loss"])}
            self.unhealthy["grad_norm"] = str(values["grad_norm"])
        return bool(healthy)


_SHOWN = {"loss": "loss", "margin": "rewards/margin", "accuracy": "rewards/accuracy"}


def _check_start(loss: float, expected: float, tolerance: float) -> None:
    """Refuse an iteration whose policy is not its opponent at the start: rounding would decide what it learns."""
    if abs(loss - expected) > tolerance:
        raise UserError(
            f"step 1: the loss is {loss:.5f}, and should be l(0) = {expected:.5f}, since the policy starts as its "
            "opponent: their log-probs differ by rounding, and beta makes much of it. Compute both by the same program "
            "with --config.spin.opponent=stored, or without such rounding with --config.model.compute_dtype=float32"
        )


def _refuse_to_go_on(
    found: dict, learning_rates: np.ndarray, state: TrainState, checkpoints: Checkpoints, directory: epath.Path
) -> None:
    """Save the last good state and say which rows the run stopped at."""
    report = directory / "not_finite.json"
    multihost.on_process_zero(lambda: write_whole(report, json.dumps(found, indent=1) + "\n"))
    good = int(state.step)
    checkpoints.save(good, state._replace(healthy=~state.healthy), wait=True)
    if learning_rates[:good].any():
        anew = f"delete {directory / 'checkpoints'} and lower --config.train.learning_rate or --config.spin.beta"
    else:  # of weights and scores that were found finite: no update is to blame, nor the learning rate
        anew = "give another --workdir and --config.model.compute_dtype=float32, for the model overflows on these rows"
    raise UserError(
        f"step {found['step']}: loss {found['loss']}, gradient norm {found['grad_norm']}: "
        f"not finite; its rows are in {report} and the state after step {good} is saved. To train the iteration anew, "
        f"{anew}"
    )
