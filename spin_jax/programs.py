"""Every jitted program of a run: made here for the stages that run them, and listed for those who compile them ahead.

One function a program, cached, so that the same program is not compiled twice; `make_programs` gives each with the
shapes that a config's run calls it with.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from spin_jax import sharding
from spin_jax import slots as slots_lib
from spin_jax.batches import Packing, Plan, empty_batch, forward_flops, plan_scoring, plan_training, spin_batch
from spin_jax.config import at_iteration
from spin_jax.data.pairs import Pair
from spin_jax.models import (
    Compute,
    ModelConfig,
    abstract_adapters,
    abstract_params,
    adapter_shardings,
    flops_per_token,
    for_compute,
    init_adapters,
    merge,
    param_shardings,
    quantise,
    quantised_shardings,
    unembed_flops,
)
from spin_jax.models.attention import choose_kernel
from spin_jax.models.flash import heads_and_tile
from spin_jax.models.tiles import share_of_causal
from spin_jax.sampling import Decoding
from spin_jax.step import (
    Batch,
    Objective,
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_step,
    on_adapters,
    pair_logprobs,
    spin_objective,
    state_shardings,
)
from spin_jax.xla import matmul_dtype, xla_options


def training_passes(config: ConfigDict) -> int:
    """Forward passes of the policy that the FLOPs of forward and backward count as: a backward pass is two matmuls for
    each of the forward, or one where the weights are frozen. The updates' own, a few per cent, are not counted."""
    return 2 if config.lora.rank else 3


def make_compute(settings: ConfigDict, model: ModelConfig, mesh: Mesh) -> Compute:
    """How `config.model` says that training computes on a mesh; "auto" is what its devices are best at.

    Raises:
        UserError: the attention kernel that was asked for cannot run.
    """
    dtype = _compute_dtype(settings, mesh, decoding=False)
    rows, heads = sharding.RULES["rows"], sharding.RULES["heads"]
    kernel = choose_kernel(settings.attention, mesh, rows, heads, head_dim=model.head_dim, dtype=dtype)
    return Compute(dtype, settings.remat, settings.logits_chunk, kernel, mesh, sharding.sum_line(mesh))


def make_decode_compute(config: ConfigDict, model: ModelConfig, compute: Compute) -> Compute:
    """The same for sampling, on the decode mesh of the same devices."""
    split = (model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    mesh = sharding.decode_mesh(compute.mesh, config.mesh.decode_tensor, split)
    dtype = _compute_dtype(config.model, mesh, decoding=True)
    return dataclasses.replace(compute, dtype=dtype, kernel=None, mesh=mesh, line=0)


def _compute_dtype(settings: ConfigDict, mesh: Mesh, decoding: bool) -> jnp.dtype:
    asked = settings.compute_dtype
    return matmul_dtype(mesh.devices.flat[0], decoding) if asked == "auto" else jnp.dtype(asked)


@functools.cache
def make_resharding(model: ModelConfig, compute: Compute, weight_dtype: str = "auto") -> Callable:
    """params -> a copy in the compute dtype, or with weights in int8, laid out for `compute.mesh`: once an iteration,
    not once a decode step."""
    function, shardings = (quantise, quantised_shardings) if weight_dtype == "int8" else (for_compute, param_shardings)
    laid_out = shardings(compute.mesh, model)
    return _jit(compute.mesh, functools.partial(function, dtype=compute.dtype), out_shardings=laid_out)


def make_sampler(
    model: ModelConfig,
    settings: ConfigDict,
    stop_ids: tuple[int, ...],
    compute: Compute,
    stops_SV: np.ndarray | None = None,
) -> slots_lib.Sampler:
    """The sampler of `config.generate`; `stops_SV` from `stop_strings.stop_table`."""
    truncate = settings.top_p < 1 or settings.top_k > 0
    dtype = jnp.dtype(jnp.int8 if settings.cache_dtype == "int8" else compute.dtype)
    decoder = slots_lib.Decoder(model, settings.max_new_tokens, truncate, compute, dtype)
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

    return slots_lib.Sampler(
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


def make_training(
    objective: Objective, optimizer: optax.GradientTransformation, micro_batches: int, params: dict, mesh: Mesh
) -> tuple[Callable, Callable]:
    """The jitted (init: params -> state, step: (state, opponent, batch) -> (state, metrics)); both donate their first.

    Args:
        params: arrays or jax.ShapeDtypeStructs, with their shardings.
    """
    shardings = state_shardings(optimizer, params)
    init = functools.partial(init_state, optimizer=optimizer)
    step = make_step(objective, optimizer, micro_batches)
    return (
        _jit(mesh, init, donate_argnums=0, out_shardings=shardings),
        _jit(mesh, step, donate_argnums=0, out_shardings=(shardings, None)),
    )


def _jit(mesh: Mesh, function: Callable, **options) -> Callable:
    return jax.jit(function, compiler_options=xla_options(mesh), **options)


# ---- the same, for compiling ahead of time


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with what a run calls it with.

    Attributes:
        name: such as "train step".
        jitted: the result of `jax.jit`.
        args: trees of jax.ShapeDtypeStruct with NamedShardings.
        kinds: what they are, in a word each: "params", "optimizer", "batch", ...; a tree that is a prefix of `args`.
        beside: by kind, trees of the same sort: what else the devices hold while it runs.
        model_flops: that the algorithm asks for, of the whole batch; 0 for programs that compute nothing to speak of.
        inside: by kind, what it makes for itself and is worth a line of its own among its temporaries.
        kernel_share: tiles that its attention kernels visit, on average over the batch's rows, over those of rows that
            hold one causal sequence each, which is what the compiler is told of.
    """

    name: str
    jitted: Callable
    args: tuple
    kinds: tuple
    beside: Mapping[str, Any]
    model_flops: float
    inside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kernel_share: float = 1.0


def make_programs(
    config: ConfigDict,
    model: ModelConfig,
    devices: Sequence[jax.Device],
    lengths: Sequence[tuple[int, int, int]] | None = None,
) -> list[Program]:
    """The programs of an iteration of a config's run, in order.

    Args:
        lengths: tokens of prompt, real and generated response of each pair of a batch; None: as long as the config's
            budgets allow, which gives the largest shapes of a run.

    Raises:
        UserError: config, model and devices do not go together.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    compute = make_compute(config.model, model, mesh)
    decode = make_decode_compute(config, model, compute)
    sharding.check_pairs(mesh, config.train.batch_size, config.train.micro_batches)
    sharding.check_batch(decode.mesh, "--config.generate.batch_size", config.generate.batch_size)
    params = _located(abstract_params(model), param_shardings(mesh, model))
    pairs = [_blank_pair(*of_pair) for of_pair in lengths or _longest(config)]
    training = _training_programs(config, model, compute, params, pairs)
    return _sampling_programs(config, model, decode, params) + training


def make_packing(settings: ConfigDict, mesh: Mesh, micro_batches: int = 1) -> Packing:
    """How `config.train` says that pairs are packed into rows on a mesh. For training `micro_batches` are those of the
    config; scoring keeps nothing for a backward pass, and takes a micro-batch's pairs at a time."""
    ways = sharding.ways(mesh, "rows") * micro_batches
    return Packing(ways, settings.length_multiple, settings.row_length)


def _longest(config: ConfigDict) -> list[tuple[int, int, int]]:
    """The lengths of a batch of the longest pairs: both responses fill their budgets."""
    data, generated = config.data, config.generate.max_new_tokens
    prompt = max(1, min(data.max_prompt_length, data.max_length - generated))
    return [(prompt, data.max_length - prompt, min(generated, data.max_length - prompt))] * config.train.batch_size


def _blank_pair(*lengths: int) -> Pair:
    return Pair(0, 0, *(np.zeros(tokens, np.int32) for tokens in lengths), False, False)


def _sampling_programs(config: ConfigDict, model: ModelConfig, compute: Compute, params: dict) -> list[Program]:
    settings = config.generate
    shards, size, cap = sharding.ways(compute.mesh, "rows"), settings.batch_size, settings.max_new_tokens
    places = slots_lib.queue_places(settings.prefill_batch_size, size, shards)
    width = slots_lib.prefill_width(config.data.max_prompt_length, settings.prompt_bucket)
    resharding = make_resharding(model, compute, settings.weight_dtype)
    laid_out = quantised_shardings if settings.weight_dtype == "int8" else param_shardings
    copy = _located(resharding.eval_shape(params), laid_out(compute.mesh, model))
    sampler = make_sampler(model, settings, (model.vocab_size - 1,), compute)
    rows = sampler.start.eval_shape(size, places, width)
    slots, queue = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(compute.mesh, s)),
        rows,
        slots_lib.specs(rows),
    )
    prompts = _located(slots_lib.no_prompts(places, width), sharding.batch_sharding(compute.mesh))
    decoding = jax.eval_shape(lambda: Decoding.of(settings, sampler.stop_ids))
    more = jax.ShapeDtypeStruct((), jnp.bool_)
    # How many steps a call makes is not known; the loop counts as one, in which slots are half way through on average.
    prefill = places * width * flops_per_token(model, (width + 1) / 2)
    drawn = size * (flops_per_token(model, width + (cap + 1) / 2) + unembed_flops(model))
    beside = {"params": params}
    return [
        Program("resharding", resharding, (params,), ("params",), {}, 0.0),
        Program(
            "prefill",
            sampler.prefill,
            (copy, queue, prompts),
            ("sampling params", "queue", "batch"),
            beside | {"cache": slots},
            prefill,
        ),
        Program(
            "decode step",
            sampler.decode,
            (copy, slots, queue, decoding, more),
            ("sampling params", "cache", "queue", "batch", "batch"),
            beside,
            drawn,
        ),
    ]


def _training_programs(
    config: ConfigDict, model: ModelConfig, compute: Compute, params: dict, pairs: Sequence[Pair]
) -> list[Program]:
    train = config.train
    schedule = learning_rate_schedule(at_iteration(train.learning_rate, 0), 1000, train.warmup_ratio)
    optimizer = make_optimizer(train.optimizer, schedule, train.clip_norm, train.weight_decay)
    objective = spin_objective(model, compute, config.spin.loss, at_iteration(config.spin.beta, 0))
    live, rank, mesh = config.spin.opponent == "live", config.lora.rank, compute.mesh
    opponent = _located(_in_compute_dtype(params, compute), param_shardings(mesh, model)) if live or rank else None
    trained, kind, merging = params, "params", []
    if rank:
        scale = config.lora.alpha / rank
        objective = on_adapters(objective, scale, live)
        trained, kind = _located(abstract_adapters(model, rank), adapter_shardings(mesh, model, rank)), "adapters"
        arguments = (params, trained), ("params", "adapters")
        merging = [Program("merging", make_merging(model, scale, mesh), *arguments, {}, 0.0)]
    init, step = make_training(objective, optimizer, train.micro_batches, trained, mesh)
    shapes = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), trained)
    state = _located(shapes, state_shardings(optimizer, trained))
    passes = training_passes(config) + live
    part = pairs[: len(pairs) // train.micro_batches]
    scoring = plan_scoring(part, len(part), make_packing(train, mesh))
    training = plan_training(pairs, np.arange(len(pairs))[None], make_packing(train, mesh, train.micro_batches))
    scored, batch = _abstract_batch(mesh, scoring), _abstract_batch(mesh, training)
    shares = [kernel_share(model, compute, pairs, plan) for plan in (scoring, training)]
    kinds = (TrainState("optimizer", kind, "optimizer", "optimizer"), "opponent", "batch")
    flops, part_flops = (sum(forward_flops(model, pair) for pair in some) for some in (pairs, part))
    score, beside = make_scorer(model, compute), {"next batch": batch}
    return [
        Program("scoring", score, (params, scored), ("params", "batch"), {}, part_flops, kernel_share=shares[0]),
        Program("optimizer init", init, (trained,), (kind,), {}, 0.0),
        Program("train step", step, (state, opponent, batch), kinds, beside, passes * flops, kernel_share=shares[1]),
        *merging,
    ]


def kernel_share(model: ModelConfig, compute: Compute, pairs: Sequence[Pair], plan: Plan) -> float:
    """`Program.kernel_share` of a program that is called with a plan's first batch; 1 without a kernel that skips."""
    if compute.kernel is None or compute.kernel.name != "flash":
        return 1.0
    ways = sharding.ways(compute.mesh, "heads")
    _, tile = heads_and_tile(model.num_heads // ways, model.num_kv_heads // ways, model.head_dim, compute.dtype)
    rows = spin_batch(model, pairs, plan.batches[0], plan.shapes[0]).arrays.rows
    return share_of_causal(rows.ends_BT, rows.positions_BT, tile, model.sliding_window)


def _in_compute_dtype(params: dict, compute: Compute) -> dict:
    return jax.eval_shape(functools.partial(for_compute, dtype=compute.dtype), params)


def _abstract_batch(mesh: Mesh, plan: Plan) -> Batch:
    """Of the shape of a plan's first batch."""
    return _located(jax.eval_shape(lambda: empty_batch(plan.shapes[0])), sharding.batch_sharding(mesh))


def _located(shapes, shardings):
    """ShapeDtypeStructs with shardings; one sharding serves all of a tree."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
