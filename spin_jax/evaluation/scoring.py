"""Log-probs of pairs: the opponent's, which an iteration's steps are trained against, and those of held-out pairs.

A margin is a difference of log-probs that are nearly equal, times beta. In bfloat16 each of them carries half a nat of
rounding or more, which cancels only if policy and opponent are computed in the same way: the same rows, the same
program. So each training step's own program scores each step's own batch (docs/algorithm.md has the measurements).
"""

import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jaxlib
import numpy as np

from spin_jax.data.batch import HostBatch
from spin_jax.data.packing import Plan, of_pairs, pack_batch
from spin_jax.data.pairs import Pair
from spin_jax.devices.compiler_options import jit
from spin_jax.devices.transfer import everywhere, fetch, put
from spin_jax.errors import UserError
from spin_jax.evaluation.score_files import Parts
from spin_jax.models import Compute, ModelConfig
from spin_jax.objectives.logprobs import pair_logprobs
from spin_jax.runtime import preemption
from spin_jax.runtime.progress import Loop


@functools.cache
def make_scorer(model: ModelConfig, compute: Compute) -> Callable:
    """(params, batch) -> log-probs of the responses of each pair; the very function that training differentiates."""
    return jit(compute.mesh, lambda params, batch: pair_logprobs(model, params, batch, compute))


_LOG = logging.getLogger(__name__)

# Of the step's arithmetic: raised where a change of the code sums in another order, so that older scores are made anew.
VERSION = 2


def score(
    logprobs: Callable,
    params: dict,
    model: ModelConfig,
    pairs: Sequence[Pair],
    plan: Plan,
    *,
    sharding: jax.sharding.NamedSharding,
    name: str,
    parts: "Parts | None" = None,
) -> np.ndarray:
    """log p(y|x) of the responses of each pair under `params`, in nats, f32 [pairs, Y].

    `logprobs` is the jitted `logprobs.pair_logprobs`. Each process computes its devices' rows, and all get all scores.
    `parts` keeps what is scored, and has what an earlier call kept.

    Raises:
        UserError: a score is not finite; the message names the rows.
    """
    logps, done = (
        np.zeros((len(pairs), max(len(pair.responses) for pair in pairs)), np.float32),
        parts.read() if parts else [],
    )
    with Loop(name, len(pairs), "pair", sum(map(len, done))) as loop:
        for rows, shape in list(zip(plan.batches, plan.shapes, strict=True))[len(done) :]:
            preemption.between_batches()
            batch = pack_batch(model, pairs, rows, shape)
            done.append(of_pairs(fetch(logprobs(params, put(batch.arrays, sharding))), rows))
            check_finite(done[-1], batch.rows)
            if parts:
                parts.keep(done)
            loop.advance(len(done[-1]))
    logps[list(itertools.chain(*itertools.chain(*plan.batches)))] = np.concatenate(done)
    return logps


def score_steps(
    step_fn: Callable,
    state: NamedTuple,
    opponent: dict | None,
    *,
    plan: Plan,
    make_batch: Callable[[int], HostBatch],
    sharding: jax.sharding.NamedSharding,
    parts: "Parts",
    name: str,
) -> tuple[NamedTuple, np.ndarray]:
    """The log-probs, under the params of `state`, of the pairs of every step's batch, by that step's own program.

    Args:
        step_fn: the jitted `train_step.make_step`; donates the state.
        state: whose params are the opponent's; returned as it was.
        opponent: what the step takes beside it.
        plan: of the steps.
        make_batch: the batch of a step.
        parts: keeps what is scored, and has what an earlier call kept.

    Returns:
        the state, and f32 [steps, pairs of a batch, Y] in nats, each batch's pairs row after row.

    Raises:
        UserError: a score is not finite; the message names the rows.
    """
    steps, done, scoring = len(plan.batches), parts.read(), everywhere(True, sharding.mesh)
    with Loop(name, steps, "step", len(done)) as loop:
        pending = None
        for step in itertools.chain(range(len(done), steps), [None]):
            preemption.between_batches()
            if step is not None:
                batch = make_batch(step)
                state, _, logps = step_fn(state, opponent, put(batch.arrays, sharding), scoring)
            if pending:  # while the devices are at the next
                of_step, rows, scored = pending
                done.append(of_pairs(fetch(scored), plan.batches[of_step]))
                check_finite(done[-1], rows)
                parts.keep(done)
                loop.advance()
            pending = None if step is None else (step, batch.rows, logps)
    return state, np.stack(done)


def check_finite(logps: np.ndarray, rows: np.ndarray) -> None:
    """Refuse scores [pairs, Y] that are not finite; `rows` are the pairs' numbers in the data set."""
    wrong = ~np.isfinite(logps).all(axis=1)
    if wrong.any():
        numbers = ", ".join(map(str, sorted(set(rows[wrong].tolist()))[:20]))
        raise UserError(
            f"the opponent's log-probs of {wrong.sum()} pair(s) are not finite (rows {numbers}): activations overflow "
            "there. Set --config.model.compute_dtype=float32, or leave these rows out of the data"
        )


# ---- on disk


def scores_key(
    pairs: Sequence[Pair],
    plan: Plan,
    compute: Compute,
    micro_batches: int = 1,
    model: Mapping[str, str] | None = None,
) -> str:
    """A hash of all that decides the bits of scores: token ids, batches, programs, devices, and the model as
    `checkpoints.fingerprint` identifies it. Scores of another key are not those that this run would make."""
    digest = hashlib.sha256(json.dumps([VERSION, model]).encode())
    for pair in pairs:
        for tokens in (pair.prompt, *pair.responses):
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    devices = compute.mesh.devices
    how = [compute.remat, compute.logits_chunk, compute.kernel, compute.line]
    program = [str(np.dtype(compute.dtype)), *how, micro_batches]
    machine = [devices.shape, devices.flat[0].device_kind, jax.__version__, jaxlib.__version__]
    digest.update(json.dumps([program, machine, plan.batches, plan.shapes]).encode())
    return digest.hexdigest()
