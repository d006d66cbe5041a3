"""The programs of a training stage, made by one function each, which is cached: no program is compiled twice.

The stages of a run and the Python surface run them, and `spin_jax/compile_check/programs.py` compiles them ahead.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import optax
from jax.sharding import Mesh

from spin_jax.config import Config, SpinConfig, at_iteration
from spin_jax.devices import sharding
from spin_jax.devices.compiler_options import jit
from spin_jax.devices.sharding import located
from spin_jax.models import (
    Compute,
    ModelConfig,
    abstract_adapters,
    abstract_params,
    adapter_shardings,
    init_adapters,
    merge,
    param_shardings,
)
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import BatchLoss, Objective, Settings, batch_loss
from spin_jax.training.optimizer import learning_rate_schedule, make_optimizer
from spin_jax.training.train_step import TrainState, init_state, make_step, on_adapters, state_shardings


@functools.cache
def make_adapters(model: ModelConfig, rank: int, mesh: Mesh) -> Callable:
    """key -> fresh low-rank updates, born where they live."""
    return jit(mesh, functools.partial(init_adapters, model, rank), out_shardings=adapter_shardings(mesh, model, rank))


@functools.cache
def make_merging(model: ModelConfig, scale: float, mesh: Mesh) -> Callable:
    """(params, adapters) -> params with the updates in them; donates the params."""
    merging = functools.partial(merge, scale=scale)
    return jit(mesh, merging, donate_argnums=0, out_shardings=param_shardings(mesh, model))


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """All that the programs of a training stage depend on; hashable, so that they are made and compiled once.

    Attributes:
        model, compute: what is trained, and how it computes.
        objective: one of objectives.OBJECTIVES.
        settings: what it reads of the config.
        live: every step computes the opponent's log-probs anew, from its params.
        rank, alpha: of low-rank updates; rank 0 trains all weights.
        optimizer, peak, steps, warmup_ratio, clip_norm, weight_decay: see `optimizer.make_optimizer` and its schedule.
        micro_batches: see `train_step.make_step`.
    """

    model: ModelConfig
    compute: Compute
    objective: Objective
    settings: Settings
    live: bool
    rank: int
    alpha: float
    optimizer: str
    peak: float
    steps: int
    warmup_ratio: float
    clip_norm: float
    weight_decay: float
    micro_batches: int

    @property
    def passes(self) -> int:
        """Forward passes that a step's FLOPs count as: a backward pass is two matmuls for each of the forward, or one
        where the weights are frozen. The updates' own, a few per cent, are not counted."""
        return (2 if self.rank else 3) + self.live


def is_scored(spin: SpinConfig) -> bool:
    """Whether `config.spin` has the reference's log-probs computed before training, and not in it or not at all."""
    return spin.opponent == "stored" and OBJECTIVES[spin.loss].reference


def spin_spec(config: Config, model: ModelConfig, compute: Compute, t: int, steps: int) -> TrainingSpec:
    """Iteration t's training stage."""
    objective, settings = OBJECTIVES[config.spin.loss], Settings(beta=at_iteration(config.spin.beta, t))
    live, peak = config.spin.opponent == "live" and objective.reference, at_iteration(config.train.learning_rate, t)
    return _spec(config, model, compute, objective, settings, live, config.train.optimizer, peak, steps)


def sft_spec(config: Config, model: ModelConfig, compute: Compute, peak: float, steps: int) -> TrainingSpec:
    """Supervised fine-tuning."""
    return _spec(config, model, compute, OBJECTIVES["sft"], Settings(), False, config.sft.optimizer, peak, steps)


def _spec(config, model, compute, objective, settings, live, optimizer, peak, steps) -> TrainingSpec:
    train, rank, alpha = config.train, config.lora.rank, config.lora.alpha
    of_steps = optimizer, peak, steps, train.warmup_ratio, train.clip_norm, train.weight_decay, train.micro_batches
    return TrainingSpec(model, compute, objective, settings, live, rank, alpha, *of_steps)


class Training(NamedTuple):
    """A training stage's programs.

    Attributes:
        init: params (donated) -> state at step 0.
        step: see `train_step.make_step`.
        schedule: steps -> their learning rates.
        state: the state as a tree of jax.ShapeDtypeStruct with shardings.
    """

    init: Callable
    step: Callable
    schedule: optax.Schedule
    state: TrainState


@functools.lru_cache(maxsize=4)  # a program is specific to an iteration's schedule
def make_training(spec: TrainingSpec) -> Training:
    """The programs of a training stage."""
    mesh = spec.compute.mesh
    trained = located(abstract_params(spec.model), param_shardings(mesh, spec.model))
    loss = batch_loss(spec.objective, spec.settings, spec.model, spec.compute)
    if spec.rank:
        loss = on_adapters(loss, spec.alpha / spec.rank, spec.live)
        adapters = abstract_adapters(spec.model, spec.rank)
        trained = located(adapters, adapter_shardings(mesh, spec.model, spec.rank))
    schedule = learning_rate_schedule(spec.peak, spec.steps, spec.warmup_ratio)
    optimizer = make_optimizer(spec.optimizer, schedule, spec.clip_norm, spec.weight_decay)
    init, step = jit_training(loss, optimizer, spec.micro_batches, trained, mesh)
    state = located(init.eval_shape(trained), state_shardings(optimizer, trained))
    return Training(init, step, schedule, state)


def jit_training(
    loss: BatchLoss, optimizer: optax.GradientTransformation, micro_batches: int, params: dict, mesh: Mesh
) -> tuple[Callable, Callable]:
    """The jitted (init: params -> state, `train_step.make_step`); both donate their first argument.

    Args:
        params: arrays or jax.ShapeDtypeStructs, with their shardings.
    """
    shardings = state_shardings(optimizer, params)
    init = functools.partial(init_state, optimizer=optimizer)
    step = make_step(loss, optimizer, micro_batches)
    return (
        jit(mesh, init, donate_argnums=0, out_shardings=shardings),
        jit(mesh, step, donate_argnums=0, out_shardings=(shardings, None, sharding.batch_sharding(mesh))),
    )
