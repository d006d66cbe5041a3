"""Make the programs of a training stage. Each is made by a cached function, so that none is compiled twice.

The stages of a run and the Python surface run them; `spin_jax/compile_check/programs.py` compiles them ahead of time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spin_jax.config import Config, LoraConfig, SpinConfig, TrainConfig, at_iteration
from spin_jax.devices import sharding
from spin_jax.devices.compiler_options import jit
from spin_jax.devices.sharding import located
from spin_jax.models import (
    Execution,
    ModelConfig,
    abstract_adapters,
    abstract_params,
    adapter_shardings,
    cast_params,
    init_adapters,
    merge,
    param_shardings,
)
from spin_jax.models.params import make_resharding
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import BatchLoss, Objective, Settings, batch_loss
from spin_jax.training.optimizer import learning_rate_schedule, make_optimizer
from spin_jax.training.train_step import TrainState, init_state, make_step, on_adapters, state_shardings


@functools.cache
def make_adapters(model: ModelConfig, lora: LoraConfig, mesh: Mesh) -> Callable:
    """Return a jitted function: key -> fresh low-rank updates, born sharded."""
    return jit(mesh, functools.partial(init_adapters, model, lora), out_shardings=adapter_shardings(mesh, model, lora))


@functools.cache
def make_merging(model: ModelConfig, scale: float, mesh: Mesh) -> Callable:
    """Return a jitted function: (params, adapters) -> params with the updates added. It donates the params."""
    merging = functools.partial(merge, scale=scale)
    return jit(mesh, merging, donate_argnums=0, out_shardings=param_shardings(mesh, model))


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """All that the programs of a training stage depend on. Hashable, so that they are made and compiled once.

    Attributes:
        model, execution: what is trained, and how it is computed.
        objective: one of objectives.OBJECTIVES.
        settings: what the objective reads of the config.
        live: whether each step computes the opponent's log-probs from its params.
        optimizer: see `optimizer.make_optimizer`.
        peak, steps: see `optimizer.learning_rate_schedule`.
        train: of which warm-up, weight decay, clipping and micro-batches are read.
        lora: the low-rank updates; with a rank of 0 all weights are trained.
        seed: of dropout, a constant of the program as the schedule is; 0 without dropout.
    """

    model: ModelConfig
    execution: Execution
    objective: Objective
    settings: Settings
    live: bool
    optimizer: str
    peak: float
    steps: int
    train: TrainConfig
    lora: LoraConfig
    seed: int = 0

    @property
    def flops_multiplier(self) -> int:
        """How many forward passes a step costs. A backward pass has two matmuls for each of the forward pass, or one if
        weights are frozen. Those of low-rank updates, a few per cent, are not counted."""
        return (2 if self.lora.rank else 3) + self.live


def is_scored(spin: SpinConfig) -> bool:
    """Whether the reference's log-probs are computed before training. (Else they are computed in it, or not needed.)"""
    return spin.opponent == "stored" and OBJECTIVES[spin.loss].reference


def reads_generated(spin: SpinConfig) -> bool:
    """Whether the objective learns from generated responses."""
    return bool({"generated", "proto"} & set(OBJECTIVES[spin.loss].responses))


def is_mixed(spin: SpinConfig, t: int) -> bool:
    """Whether the reference of iteration t is a mixture of the opponent and theta_0. At iteration 0 the two are one."""
    return spin.opponent_share < 1 and t > 0


def spin_spec(config: Config, model: ModelConfig, execution: Execution, t: int, steps: int) -> TrainingSpec:
    """Return the spec of iteration t's training stage."""
    spin, train, objective = config.spin, config.train, OBJECTIVES[config.spin.loss]
    return TrainingSpec(
        model=model,
        execution=execution,
        objective=objective,
        settings=Settings.at(spin, t),
        live=spin.opponent == "live" and objective.reference,
        optimizer=train.optimizer,
        peak=at_iteration(train.learning_rate, t),
        steps=steps,
        train=train,
        lora=config.lora,
        seed=config.seed + t if config.lora.dropout else 0,
    )


def sft_spec(config: Config, model: ModelConfig, execution: Execution, peak: float, steps: int) -> TrainingSpec:
    """Return the spec of supervised fine-tuning: with another objective, optimizer and learning rate than SPIN's."""
    other = {"objective": OBJECTIVES["sft"], "settings": Settings(), "live": False, "optimizer": config.sft.optimizer}
    return dataclasses.replace(spin_spec(config, model, execution, 0, steps), peak=peak, **other)


class Training(NamedTuple):
    """A training stage's programs.

    Attributes:
        init: params (donated) -> state at step 0.
        step: see `train_step.make_step`.
        merge: (params (donated), low-rank updates) -> params; None where all weights are trained.
        schedule: steps -> their learning rates.
        state: the state as a tree of jax.ShapeDtypeStruct with shardings.
        frozen: the step's second argument, likewise: params in the compute dtype, of a live opponent or under low-rank
            updates (one copy serves both); None if there is neither.
        begin: (params, seed of fresh low-rank updates) -> (state at step 0, frozen params). It may donate the params.
    """

    init: Callable
    step: Callable
    merge: Callable | None
    schedule: optax.Schedule
    state: TrainState
    frozen: dict | None
    begin: Callable


@functools.lru_cache(maxsize=4)  # a few only: each iteration's schedule is another program
def make_training(spec: TrainingSpec) -> Training:
    """The programs of a training stage."""
    model, mesh, train, lora = spec.model, spec.execution.mesh, spec.train, spec.lora
    merge, frozen, dropout = None, None, None
    trained, cast = (
        located(abstract_params(model), param_shardings(mesh, model)),
        make_resharding(model, spec.execution),
    )
    if lora.rank or spec.live:
        frozen = located(cast.eval_shape(trained), param_shardings(mesh, model))
    loss = batch_loss(spec.objective, spec.settings, model, spec.execution)
    if lora.rank:
        merge, loss = make_merging(model, lora.scale, mesh), on_adapters(loss, lora.scale, spec.live)
        trained = located(abstract_adapters(model, lora), adapter_shardings(mesh, model, lora))
        dropout = (lora.dropout, spec.seed) if lora.dropout else None
    schedule = learning_rate_schedule(spec.peak, spec.steps, train.warmup_ratio)
    optimizer = make_optimizer(spec.optimizer, schedule, train.clip_norm, train.weight_decay)
    init, step = jit_training(loss, optimizer, train.micro_batches, trained, mesh, dropout)
    state = located(init.eval_shape(trained), state_shardings(optimizer, trained))

    def begin(params: dict, seed: int) -> tuple[TrainState, dict | None]:
        frozen = None
        if lora.rank:  # the f32 params are not needed: they are read again for merging
            frozen, params = cast(params), make_adapters(model, lora, mesh)(jax.random.key(seed))
        elif spec.live:
            frozen = jax.tree.map(jnp.copy, cast_params(model, params, spec.execution.dtype))
        return init(params), frozen

    return Training(init=init, step=step, merge=merge, schedule=schedule, state=state, frozen=frozen, begin=begin)


def jit_training(
    loss: BatchLoss,
    optimizer: optax.GradientTransformation,
    micro_batches: int,
    params: dict,
    mesh: Mesh,
    dropout: tuple[float, int] | None = None,
) -> tuple[Callable, Callable]:
    """Return the jitted (init: params -> state, step of `train_step.make_step`). Both donate their first argument.

    Args:
        params: arrays or jax.ShapeDtypeStructs, with their shardings.
        dropout: see `train_step.make_step`.
    """
    shardings = state_shardings(optimizer, params)
    init = functools.partial(init_state, optimizer=optimizer)
    step = make_step(loss, optimizer, micro_batches, dropout)
    return (
        jit(mesh, init, donate_argnums=0, out_shardings=shardings),
        jit(mesh, step, donate_argnums=0, out_shardings=(shardings, None, sharding.batch_sharding(mesh))),
    )
