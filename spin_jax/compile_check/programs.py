"""The programs of a config's run with the shapes that it calls them with, for compiling ahead of time.

They are those of `Engine`, of `Scorer` and of `training.programs`, which the stages run.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spin_jax import sizing
from spin_jax.config import Config
from spin_jax.data.batch import Batch, empty_batch
from spin_jax.data.packing import Packing, Plan, forward_flops, make_packing, pack_batch, plan_training
from spin_jax.data.pairs import RESPONSES, Pair, choose
from spin_jax.devices import sharding
from spin_jax.devices.accelerators import Device
from spin_jax.evaluation.scoring import Scorer, response_program
from spin_jax.generation.engine import Engine
from spin_jax.kernels.block_mask import share_of_causal
from spin_jax.kernels.flash_tpu import heads_and_tile
from spin_jax.language_model import on_both_meshes
from spin_jax.models import Execution, ModelConfig, abstract_params, flops_per_token, param_shardings, unembed_flops
from spin_jax.objectives.interface import check_objective
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
    devices: Sequence[Device],
    lengths: Sequence[tuple[int, int, int]] | None = None,
) -> list[Program]:
    """The programs of an iteration of a config's run, in order.

    Args:
        lengths: tokens of prompt, real and generated response of each pair of a batch; None: as long as the config's
            budgets allow, which gives the largest shapes of a run.

    Raises:
        UserError: config, model and devices do not go together.
    """
    check_objective(config.spin)
    config = sizing.choose(config, model, devices)
    execution, decode = on_both_meshes(config, model, devices)
    sharding.check_pairs(execution.mesh, config.train.batch_size, config.train.micro_batches)
    params = sharding.located(abstract_params(model), param_shardings(execution.mesh, model))
    engine = Engine(model, config.generate, decode, stop_ids=(model.vocab_size - 1,))
    scorer = Scorer(model, config.train, execution)
    pairs = [_blank_pair(*of_pair) for of_pair in lengths or [sizing.longest_pair(config)] * config.train.batch_size]
    scored = [choose(pair, RESPONSES) for pair in pairs[: len(pairs) // config.train.micro_batches]]
    spec = programs.spin_spec(config, model, execution, t=0, steps=1000)  # the number of steps changes constants alone
    return [
        *_sampling_programs(engine, config.data.max_prompt_length, params),
        _scoring_program(scorer, scored, params),
        *_training_programs(
            spec,
            make_packing(config.train, execution.mesh, config.train.micro_batches),
            [choose(pair, spec.objective.responses) for pair in pairs],
            params,
        ),
    ]


def _blank_pair(*lengths: int) -> Pair:
    """A pair with all responses that a run can give it; theta_0 wrote one as long as the generated one."""
    prompt, real, generated = (np.zeros(tokens, np.int32) for tokens in lengths)
    return Pair(0, 0, prompt, (real, generated, generated), (False,) * 3)


def _sampling_programs(engine: Engine, longest_prompt: int, params: dict) -> list[Program]:
    made, calls, model = engine.programs, engine.abstract_calls(longest_prompt), engine.model
    slots, size, cap = calls["decode"][1], engine.settings.batch_size, engine.settings.max_new_tokens
    places, width = calls["prefill"][2].tokens_EW.shape
    # How many steps a call makes is not known; the loop counts as one, in which slots are half way through on average.
    prefill = places * width * flops_per_token(model, (width + 1) / 2)
    drawn = size * (flops_per_token(model, width + (cap + 1) / 2) + unembed_flops(model))
    beside = {"params": params}
    kinds = ("sampling params", "cache", "queue", "batch", "batch")
    return [
        Program("resharding", made.lay_out, (params,), ("params",), {}, 0.0),
        Program("prefill", made.prefill, calls["prefill"], (kinds[0], *kinds[2:4]), beside | {"cache": slots}, prefill),
        Program("decode step", made.decode, calls["decode"], kinds, beside, drawn),
    ]


def _scoring_program(scorer: Scorer, pairs: Sequence[Pair], params: dict) -> Program:
    model, execution, plan = scorer.model, scorer.execution, scorer.plan(pairs)
    batch, share = _abstract_batch(execution.mesh, plan), kernel_share(model, execution, pairs, plan)
    flops = sum(forward_flops(model, pair) for pair in pairs)
    program = response_program(model, execution)
    return Program("scoring", program, (params, batch), ("params", "batch"), {}, flops, kernel_share=share)


def _training_programs(
    spec: programs.TrainingSpec, packing: Packing, pairs: Sequence[Pair], params: dict
) -> list[Program]:
    model, execution, training = spec.model, spec.execution, programs.make_training(spec)
    plan = plan_training(pairs, np.arange(len(pairs))[None], packing)
    batch, share = _abstract_batch(execution.mesh, plan), kernel_share(model, execution, pairs, plan)
    kind = "adapters" if spec.lora.rank else "params"
    state_kinds: Any = ("optimizer", kind, "optimizer", "optimizer")
    kinds = (TrainState(*state_kinds), "opponent", "batch", "batch")
    flops = spec.flops_multiplier * sum(forward_flops(model, pair) for pair in pairs)
    step = (training.state, training.frozen, batch, jax.ShapeDtypeStruct((), jnp.bool_))
    found = [
        Program("optimizer init", training.init, (training.state.params,), (kind,), {}, 0.0),
        Program("train step", training.step, step, kinds, {"next batch": batch}, flops, kernel_share=share),
    ]
    if training.merge:
        arguments = (params, training.state.params)
        found.append(Program("merging", training.merge, arguments, ("params", "adapters"), {}, 0.0))
    return found


def kernel_share(model: ModelConfig, execution: Execution, pairs: Sequence[Pair], plan: Plan) -> float:
    """`Program.kernel_share` of a program that is called with a plan's first batch; 1 without a kernel that skips."""
    if execution.kernel != "flash":
        return 1.0
    num_shards = sharding.num_shards(execution.mesh, "heads")
    _, tile = heads_and_tile(
        model.num_heads // num_shards, model.num_kv_heads // num_shards, model.head_dim, execution.dtype
    )
    rows = pack_batch(model, pairs, plan.batches[0], plan.shapes[0]).arrays.rows
    tokens = rows.visible_until_BT, rows.positions_BT
    return sum(share * share_of_causal(*tokens, tile, window) for window, share in model.window_shares.items())


def _abstract_batch(mesh: Mesh, plan: Plan) -> Batch:
    """Of the shape of a plan's first batch."""
    return sharding.located(jax.eval_shape(lambda: empty_batch(plan.shapes[0])), sharding.batch_sharding(mesh))
