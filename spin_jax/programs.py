"""Every jitted program of a run, made by one function each, which is cached: no program is compiled twice.

`spin_jax/compile_programs.py` lists them with the shapes that a run calls them with.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from spin_jax import sharding
from spin_jax import slots as slots_lib
from spin_jax.batches import Packing
from spin_jax.config import at_iteration
from spin_jax.models import (
    Compute,
    ModelConfig,
    abstract_adapters,
    abstract_params,
    adapter_shardings,
    for_compute,
    init_adapters,
    merge,
    param_shardings,
    split_layers,
)
from spin_jax.models.attention import choose_kernel
from spin_jax.step import (
    Objective,
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_step,
    on_adapters,
    pair_logprobs,
    sft_objective,
    spin_objective,
    state_shardings,
)
from spin_jax.xla import compute_dtype, xla_options


def make_compute(settings: ConfigDict, model: ModelConfig, mesh: Mesh) -> Compute:
    """How `config.model` says that training computes on a mesh; "auto" is what its devices are best at.

    Raises:
        UserError: the attention kernel that was asked for cannot run.
    """
    dtype = compute_dtype(settings.compute_dtype, mesh.devices.flat[0])
    rows, heads = sharding.RULES["rows"], sharding.RULES["heads"]
    kernel = choose_kernel(settings.attention, mesh, rows, heads, head_dim=model.head_dim, dtype=dtype)
    return Compute(dtype, settings.remat, settings.logits_chunk, kernel, mesh, sharding.sum_line(mesh))


def make_decode_compute(config: ConfigDict, model: ModelConfig, compute: Compute) -> Compute:
    """The same for sampling, on the decode mesh of the same devices."""
    ways = sharding.decode_ways(compute.mesh.size, config.mesh.decode_tensor, model.tensor_axes)
    mesh = sharding.decode_mesh(compute.mesh, ways)
    return dataclasses.replace(compute, kernel=None, mesh=mesh, line=0)


@functools.cache
def make_resharding(model: ModelConfig, compute: Compute) -> Callable:
    """params -> a copy in the compute dtype, laid out for `compute.mesh`."""
    copy = functools.partial(for_compute, dtype=compute.dtype)
    return _jit(compute.mesh, copy, out_shardings=param_shardings(compute.mesh, model))


def make_sampler(
    model: ModelConfig,
    settings: ConfigDict,
    stop_ids: tuple[int, ...],
    compute: Compute,
    stops_SV: np.ndarray | None = None,
) -> slots_lib.Sampler:
    """The sampler of `config.generate`; `stops_SV` from `stop_strings.stop_table`."""
    truncate = settings.top_p < 1 or settings.top_k > 0
    decoder = slots_lib.Decoder(model, settings.max_new_tokens, truncate, compute)
    return dataclasses.replace(_sampler(decoder), stop_ids=stop_ids, stops_SV=stops_SV)


@functools.cache
def _sampler(decoder: slots_lib.Decoder) -> slots_lib.Sampler:
    mesh = decoder.compute.mesh
    rows = jax.tree.map(
        functools.partial(NamedSharding, mesh),
        slots_lib.specs(jax.eval_shape(lambda: slots_lib.start(decoder, 1, 1, 1))),
    )
    slots, queue = rows
    whole, ended = NamedSharding(mesh, PartitionSpec()), slots.responses

    def make(function: Callable, **options) -> Callable:
        return _jit(mesh, functools.partial(function, decoder), **options)

    if decoder.by_layer:
        cast = functools.partial(for_compute, dtype=decoder.compute.dtype)
        copy, laid_out = _jit(mesh, lambda params: split_layers(cast(params)), out_shardings=whole), whole
    else:
        copy, laid_out = make_resharding(decoder.model, decoder.compute), param_shardings(mesh, decoder.model)
    return slots_lib.Sampler(
        copy=copy,
        abstract_params=located(copy.eval_shape(abstract_params(decoder.model)), laid_out),
        start=make(slots_lib.start, static_argnums=(0, 1, 2), out_shardings=rows),
        prefill=make(slots_lib.prefill, donate_argnums=1, out_shardings=queue),
        decode=make(slots_lib.decode, donate_argnums=(1, 2), out_shardings=(slots, queue, ended, whole)),
        drain=make(slots_lib.drain, donate_argnums=1, out_shardings=slots),
        shrink=make(slots_lib.shrink, static_argnums=1, out_shardings=(slots, ended, whole)),
    )


@functools.cache
def make_scorer(model: ModelConfig, compute: Compute) -> Callable:
    """(params, batch) -> log-probs of both responses of each pair; the very function that training differentiates."""
    return _jit(compute.mesh, lambda params, batch: pair_logprobs(model, params, batch, compute))


@functools.cache
def make_adapters(model: ModelConfig, rank: int, mesh: Mesh) -> Callable:
    """key -> fresh low-rank updates, born where they live."""
    return _jit(mesh, functools.partial(init_adapters, model, rank), out_shardings=adapter_shardings(mesh, model, rank))


@functools.cache
def make_merging(model: ModelConfig, scale: float, mesh: Mesh) -> Callable:
    """(params, adapters) -> params with the updates in them; donates the params."""
    merging = functools.partial(merge, scale=scale)
    return _jit(mesh, merging, donate_argnums=0, out_shardings=param_shardings(mesh, model))


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """All that the programs of a training stage depend on; hashable, so that they are made and compiled once.

    Attributes:
        model, compute: what is trained, and how it computes.
        loss: one of losses.LOSSES; None: supervised fine-tuning.
        beta: lambda of equation 4.7.
        live: every step computes the opponent's log-probs anew, from its params.
        rank, alpha: of low-rank updates; rank 0 trains all weights.
        optimizer, peak, steps, warmup_ratio, clip_norm, weight_decay: see `step.make_optimizer` and its schedule.
        micro_batches: see `step.make_step`.
    """

    model: ModelConfig
    compute: Compute
    loss: str | None
    beta: float
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


def spin_spec(config: ConfigDict, model: ModelConfig, compute: Compute, t: int, steps: int) -> TrainingSpec:
    """Iteration t's training stage."""
    live, beta = config.spin.opponent == "live", at_iteration(config.spin.beta, t)
    peak = at_iteration(config.train.learning_rate, t)
    return _spec(config, model, compute, config.spin.loss, beta, live, config.train.optimizer, peak, steps)


def sft_spec(config: ConfigDict, model: ModelConfig, compute: Compute, peak: float, steps: int) -> TrainingSpec:
    """Supervised fine-tuning."""
    return _spec(config, model, compute, None, 0.0, False, config.sft.optimizer, peak, steps)


def _spec(config, model, compute, loss, beta, live, optimizer, peak, steps) -> TrainingSpec:
    train, rank, alpha = config.train, config.lora.rank, config.lora.alpha
    of_steps = optimizer, peak, steps, train.warmup_ratio, train.clip_norm, train.weight_decay, train.micro_batches
    return TrainingSpec(model, compute, loss, beta, live, rank, alpha, *of_steps)


class Training(NamedTuple):
    """A training stage's programs.

    Attributes:
        init: params (donated) -> state at step 0.
        step: see `step.make_step`.
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
    if spec.loss:
        objective = spin_objective(spec.model, spec.compute, spec.loss, spec.beta)
    else:
        objective = sft_objective(spec.model, spec.compute)
    if spec.rank:
        objective = on_adapters(objective, spec.alpha / spec.rank, spec.live)
        adapters = abstract_adapters(spec.model, spec.rank)
        trained = located(adapters, adapter_shardings(mesh, spec.model, spec.rank))
    schedule = learning_rate_schedule(spec.peak, spec.steps, spec.warmup_ratio)
    optimizer = make_optimizer(spec.optimizer, schedule, spec.clip_norm, spec.weight_decay)
    init, step = jit_training(objective, optimizer, spec.micro_batches, trained, mesh)
    state = located(init.eval_shape(trained), state_shardings(optimizer, trained))
    return Training(init, step, schedule, state)


def jit_training(
    objective: Objective, optimizer: optax.GradientTransformation, micro_batches: int, params: dict, mesh: Mesh
) -> tuple[Callable, Callable]:
    """The jitted (init: params -> state, `step.make_step`); both donate their first argument.

    Args:
        params: arrays or jax.ShapeDtypeStructs, with their shardings.
    """
    shardings = state_shardings(optimizer, params)
    init = functools.partial(init_state, optimizer=optimizer)
    step = make_step(objective, optimizer, micro_batches)
    return (
        _jit(mesh, init, donate_argnums=0, out_shardings=shardings),
        _jit(mesh, step, donate_argnums=0, out_shardings=(shardings, None, sharding.batch_sharding(mesh))),
    )


def _jit(mesh: Mesh, function: Callable, **options) -> Callable:
    return jax.jit(function, compiler_options=xla_options(mesh), **options)


def make_packing(settings: ConfigDict, mesh: Mesh, micro_batches: int = 1) -> Packing:
    """How `config.train` says that pairs are packed into rows on a mesh. For training `micro_batches` are those of the
    config; scoring keeps nothing for a backward pass, and takes a micro-batch's pairs at a time."""
    ways = sharding.ways(mesh, "rows") * micro_batches
    return Packing(ways, settings.length_multiple, settings.row_length, settings.row_shapes)


def located(shapes, shardings):
    """ShapeDtypeStructs with shardings; one sharding serves all of a tree."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
