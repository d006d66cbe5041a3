"""The programs of a config's run with the shapes that it calls them with, for compiling ahead of time.

They are those of the `programs` of training and of generation, and of `evaluation/scoring.py`, which the stages run.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from spin_jax import sizing
from spin_jax.config import Config
from spin_jax.data.batch import Batch, empty_batch
from spin_jax.data.packing import Plan, forward_flops, make_packing, pack_batch, plan_scoring, plan_training
from spin_jax.data.pairs import Pair
from spin_jax.devices import sharding
from spin_jax.evaluation.scoring import make_scorer
from spin_jax.generation import decode_loop
from spin_jax.generation.programs import make_sampler
from spin_jax.generation.sampling import Decoding
from spin_jax.kernels.block_mask import share_of_causal
from spin_jax.kernels.flash_tpu import heads_and_tile
from spin_jax.models import (
    Compute,
    ModelConfig,
    abstract_params,
    execution,
    flops_per_token,
    param_shardings,
    unembed_flops,
)
from spin_jax.models.params import make_resharding
from spin_jax.training import programs
from spin_jax.training.train_step import TrainState


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
    config: Config,
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
    config = sizing.choose(config, model, devices)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    compute = execution.make_compute(config.model, model, mesh)
    decode = execution.make_decode_compute(config.mesh, model, compute)
    sharding.check_pairs(mesh, config.train.batch_size, config.train.micro_batches)
    sharding.check_batch(decode.mesh, "--config.generate.batch_size", config.generate.batch_size)
    params = sharding.located(abstract_params(model), param_shardings(mesh, model))
    pairs = [_blank_pair(*of_pair) for of_pair in lengths or [sizing.longest_pair(config)] * config.train.batch_size]
    training = _training_programs(config, model, compute, params, pairs)
    return _sampling_programs(config, model, decode, params) + training


def _blank_pair(*lengths: int) -> Pair:
    prompt, *responses = (np.zeros(tokens, np.int32) for tokens in lengths)
    return Pair(0, 0, prompt, tuple(responses), (False,) * len(responses))


def _sampling_programs(config: Config, model: ModelConfig, compute: Compute, params: dict) -> list[Program]:
    settings = config.generate
    shards, size, cap = sharding.ways(compute.mesh, "rows"), settings.batch_size, settings.max_new_tokens
    places = decode_loop.queue_places(settings.prefill_batch_size, size, shards)
    width = decode_loop.prefill_width(config.data.max_prompt_length, settings.prompt_bucket)
    sampler = make_sampler(model, settings, (model.vocab_size - 1,), compute)
    rows = sampler.start.eval_shape(size, places, width)
    slots, queue = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(compute.mesh, s)),
        rows,
        decode_loop.specs(rows),
    )
    prompts = sharding.located(decode_loop.no_prompts(places, width), sharding.batch_sharding(compute.mesh))
    decoding = jax.eval_shape(lambda: Decoding.of(settings, sampler.stop_ids))
    more = jax.ShapeDtypeStruct((), jnp.bool_)
    # How many steps a call makes is not known; the loop counts as one, in which slots are half way through on average.
    prefill = places * width * flops_per_token(model, (width + 1) / 2)
    drawn = size * (flops_per_token(model, width + (cap + 1) / 2) + unembed_flops(model))
    beside = {"params": params}
    return [
        Program("resharding", sampler.copy, (params,), ("params",), {}, 0.0),
        Program(
            "prefill",
            sampler.prefill,
            (sampler.abstract_params, queue, prompts),
            ("sampling params", "queue", "batch"),
            beside | {"cache": slots},
            prefill,
        ),
        Program(
            "decode step",
            sampler.decode,
            (sampler.abstract_params, slots, queue, decoding, more),
            ("sampling params", "cache", "queue", "batch", "batch"),
            beside,
            drawn,
        ),
    ]


def _training_programs(
    config: Config, model: ModelConfig, compute: Compute, params: dict, pairs: Sequence[Pair]
) -> list[Program]:
    train, mesh = config.train, compute.mesh
    spec = programs.spin_spec(
        config, model, compute, 0, steps=1000
    )  # any number of steps is the same program but for constants
    init, step, _, state = programs.make_training(spec)
    frozen = sharding.located(make_resharding(model, compute).eval_shape(params), param_shardings(mesh, model))
    kind, merging = "params", []
    if spec.rank:
        kind, arguments = "adapters", ((params, state.params), ("params", "adapters"))
        merging = [Program("merging", programs.make_merging(model, spec.alpha / spec.rank, mesh), *arguments, {}, 0.0)]
    part = pairs[: len(pairs) // train.micro_batches]
    scoring = plan_scoring(part, len(part), make_packing(train, mesh))
    training = plan_training(pairs, np.arange(len(pairs))[None], make_packing(train, mesh, train.micro_batches))
    scored, batch = _abstract_batch(mesh, scoring), _abstract_batch(mesh, training)
    shares = [kernel_share(model, compute, pairs, plan) for plan in (scoring, training)]
    kinds = (TrainState("optimizer", kind, "optimizer", "optimizer"), "opponent", "batch", "batch")
    flops, part_flops = (sum(forward_flops(model, pair) for pair in some) for some in (pairs, part))
    score, beside = make_scorer(model, compute), {"next batch": batch}
    arguments = (state, frozen if spec.live or spec.rank else None, batch, jax.ShapeDtypeStruct((), jnp.bool_))
    return [
        Program("scoring", score, (params, scored), ("params", "batch"), {}, part_flops, kernel_share=shares[0]),
        Program("optimizer init", init, (state.params,), (kind,), {}, 0.0),
        Program("train step", step, arguments, kinds, beside, spec.passes * flops, kernel_share=shares[1]),
        *merging,
    ]


def kernel_share(model: ModelConfig, compute: Compute, pairs: Sequence[Pair], plan: Plan) -> float:
    """`Program.kernel_share` of a program that is called with a plan's first batch; 1 without a kernel that skips."""
    if compute.kernel != "flash":
        return 1.0
    ways = sharding.ways(compute.mesh, "heads")
    _, tile = heads_and_tile(model.num_heads // ways, model.num_kv_heads // ways, model.head_dim, compute.dtype)
    rows = pack_batch(model, pairs, plan.batches[0], plan.shapes[0]).arrays.rows
    return share_of_causal(rows.visible_until_BT, rows.positions_BT, tile, model.sliding_window)


def _abstract_batch(mesh: Mesh, plan: Plan) -> Batch:
    """Of the shape of a plan's first batch."""
    return sharding.located(jax.eval_shape(lambda: empty_batch(plan.shapes[0])), sharding.batch_sharding(mesh))
