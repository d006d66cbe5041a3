"""Put a training stage of a run together (its programs, its start, the pairs of each step), and train it."""

import dataclasses
import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from spin_jax.checkpoints.train_state import damaged_of
from spin_jax.data.batch import HostBatch
from spin_jax.data.packing import Plan, make_packing, pack_batch, plan_training
from spin_jax.data.pairs import Pair, choose
from spin_jax.devices import sharding
from spin_jax.runtime import multihost
from spin_jax.self_play.flops import matched_steps
from spin_jax.self_play.pairs import mixed_pairs, with_proto
from spin_jax.self_play.run import Run
from spin_jax.training import programs
from spin_jax.training.loop import LoopSpec, fit
from spin_jax.training.schedule import batch_order, num_steps

_LOG = logging.getLogger(__name__)


class TrainingStage(NamedTuple):
    """A training stage, ready to begin: its programs, where it starts, and which pairs each step takes."""

    spec: programs.TrainingSpec
    start: epath.Path  # of the model that it trains
    seed: int  # of the data's order and of fresh low-rank updates
    pairs: list[Pair]
    plan: Plan

    @property
    def training(self) -> programs.Training:
        """The stage's programs."""
        return programs.make_training(self.spec)

    def make_batch(self, run: Run, reference_logps: np.ndarray | None = None) -> Callable[[int], HostBatch]:
        """Return a function step -> batch, which depends on (seed, step) and the pairs.

        Args:
            reference_logps: the reference's log-probs to put into the batches, [steps, pairs of a batch, Y].
        """
        plan, objective = self.plan, self.spec.objective
        named = {"responses": objective.responses, "mean_over": objective.mean_over}

        def batch(step: int) -> HostBatch:
            logps = None if reference_logps is None else reference_logps[step]
            rows, shape = plan.batches[step], plan.shapes[step]
            return pack_batch(run.model, self.pairs, rows, shape, **named, reference_logps=logps)

        return batch


def _planned(run: Run, spec: programs.TrainingSpec, start: epath.Path, seed: int, pairs: list[Pair]) -> TrainingStage:
    settings = run.config.train
    packing = make_packing(settings, run.execution.mesh, settings.micro_batches)
    plan = plan_training(pairs, batch_order(len(pairs), settings.batch_size, seed, spec.steps), packing)
    return TrainingStage(spec, start, seed, pairs, plan)


def spin_stage(run: Run, t: int) -> TrainingStage:
    """Return the training stage of iteration t."""
    spec, pairs = spin_spec(run, t)
    return _planned(run, spec, run.start_of(t), run.config.seed + t, pairs)


def spin_spec(run: Run, t: int) -> tuple[programs.TrainingSpec, list[Pair]]:
    """Return what iteration t trains, with the number of steps, and its pairs. The number of steps is that of
    `config.train.epochs`, or of the FLOPs of another run."""
    train, pairs = run.config.train, mixed_pairs(run, t)
    steps = 1 if train.match_flops else num_steps(len(pairs), train.epochs, train.batch_size)
    spec = programs.spin_spec(run.config, run.model, run.execution, t, steps)
    if "proto" in spec.objective.responses:
        pairs = with_proto(run, pairs)
    pairs = [choose(pair, spec.objective.responses) for pair in pairs]
    if train.match_flops:
        spec = dataclasses.replace(spec, steps=matched_steps(run, t, spec, pairs))
    return spec, pairs


def sft_stage(run: Run, start: epath.Path, pairs: list[Pair], steps: int, peak: float) -> TrainingStage:
    """Return a stage of supervised fine-tuning of the model in `start`; `peak` is the highest learning rate."""
    spec = programs.sft_spec(run.config, run.model, run.execution, peak, steps)
    return _planned(run, spec, start, run.config.seed, pairs)


def fit_stage(
    run: Run,
    stage: TrainingStage,
    make_batch: Callable[[int], HostBatch],
    directory: epath.Path,
    name: str,
    start_loss: tuple[float, float] | None = None,
) -> dict:
    """Train a stage and return its params. Write low-rank updates to `adapter/`, and merge them into the params."""
    spec, training = stage.spec, stage.training
    _LOG.info("%s", stage.plan)
    state, frozen = training.begin(run.store.take_params(stage.start), stage.seed)
    with run.profiler.traced(training.step, directory / "profile") as step:
        loop = LoopSpec(
            name=name,
            steps=spec.steps,
            directory=directory,
            checkpoint_every=run.config.train.checkpoint_every,
            sharding=sharding.batch_sharding(run.execution.mesh),
            schedule=training.schedule,
            flops_multiplier=spec.flops_multiplier,
            start_loss=start_loss,
        )
        state = fit(step, state, frozen, make_batch, loop)
    if training.merge:
        del frozen
        run.store.export_adapter(directory / "adapter", spec.lora, state.params, stage.start)
        return training.merge(run.store.take_params(stage.start), state.params)
    return state.params


def export_model(run: Run, directory: epath.Path, params: dict) -> None:
    """Write the model that a training stage has made, and delete its checkpoints."""
    run.store.export(directory / "model", params)
    is_trained(directory)


def is_trained(directory: epath.Path) -> bool:
    """Whether a training stage has exported its model. If it has, delete its checkpoints, each three times the model's
    size: nobody needs them any more."""

    def is_whole() -> bool:
        whole = (directory / "model" / "config.json").exists()
        if whole:
            checkpoints = directory / "checkpoints"
            checkpoints.rmtree(missing_ok=True)
            damaged_of(checkpoints).rmtree(missing_ok=True)
        return whole

    return multihost.on_process_zero(is_whole)
