"""Log-probs of pairs: the opponent's, which an iteration's steps are trained against, and those of held-out pairs.

A margin is a difference of log-probs that are nearly equal, times beta. In bfloat16 each of them carries half a nat of
rounding or more, which cancels only if policy and opponent are computed in the same way: the same rows, the same
program. So each training step's own program scores each step's own batch (docs/algorithm.md has the measurements).
"""

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence

import jax
import jaxlib
import numpy as np
from etils import epath

from spin_jax import hosts, stopping
from spin_jax.batches import HostBatch, Plan, everywhere, fetch, of_pairs, put, spin_batch
from spin_jax.data.pairs import Pair
from spin_jax.errors import UserError
from spin_jax.files import find, write_whole
from spin_jax.losses import rewards
from spin_jax.models import Compute, ModelConfig
from spin_jax.progress import Loop
from spin_jax.step import TrainState

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
    """log p(y|x) of the real and the generated response of each pair under `params`, in nats, f32 [pairs, 2].

    `logprobs` is the jitted `step.pair_logprobs`. Each process computes its devices' rows, and all get all scores.
    `parts` keeps what is scored, and has what an earlier call kept.

    Raises:
        UserError: a score is not finite; the message names the rows.
    """
    logps, done = np.zeros((len(pairs), 2), np.float32), parts.read() if parts else []
    with Loop(name, len(pairs), "pair", sum(map(len, done))) as loop:
        for rows, shape in list(zip(plan.batches, plan.shapes, strict=True))[len(done) :]:
            stopping.between_batches()
            batch = spin_batch(model, pairs, rows, shape)
            done.append(of_pairs(fetch(logprobs(params, put(batch.arrays, sharding))), rows))
            check_finite(done[-1], batch.rows)
            if parts:
                parts.keep(done)
            loop.advance(len(done[-1]))
    logps[list(itertools.chain(*itertools.chain(*plan.batches)))] = np.concatenate(done)
    return logps


def score_steps(
    step_fn: Callable,
    state: TrainState,
    opponent: dict | None,
    *,
    plan: Plan,
    make_batch: Callable[[int], HostBatch],
    sharding: jax.sharding.NamedSharding,
    parts: "Parts",
    name: str,
) -> tuple[TrainState, np.ndarray]:
    """The log-probs, under the params of `state`, of the pairs of every step's batch, by that step's own program.

    Args:
        step_fn: the jitted `step.make_step`; donates the state.
        state: whose params are the opponent's; returned as it was.
        opponent: what the step takes beside it.
        plan: of the steps.
        make_batch: the batch of a step.
        parts: keeps what is scored, and has what an earlier call kept.

    Returns:
        the state, and f32 [steps, pairs of a batch, 2] in nats, each batch's pairs row after row.

    Raises:
        UserError: a score is not finite; the message names the rows.
    """
    steps, done, scoring = len(plan.batches), parts.read(), everywhere(True, sharding.mesh)
    with Loop(name, steps, "step", len(done)) as loop:
        pending = None
        for step in itertools.chain(range(len(done), steps), [None]):
            stopping.between_batches()
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
    """Refuse scores [pairs, 2] that are not finite; `rows` are the pairs' numbers in the data set."""
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
    `models.fingerprint` identifies it. Scores of another key are not those that this run would make."""
    digest = hashlib.sha256(json.dumps([VERSION, model]).encode())
    for pair in pairs:
        for tokens in (pair.prompt, pair.real, pair.generated):
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    devices = compute.mesh.devices
    kernel = compute.kernel.name if compute.kernel else None
    program = [str(np.dtype(compute.dtype)), compute.remat, compute.logits_chunk, kernel, compute.line, micro_batches]
    machine = [devices.shape, devices.flat[0].device_kind, jax.__version__, jaxlib.__version__]
    digest.update(json.dumps([program, machine, plan.batches, plan.shapes]).encode())
    return digest.hexdigest()


def write_scores(path: epath.Path, key: str, logps: np.ndarray, pairs: Sequence[Pair]) -> None:
    """Store scores [..., 2] with their key and with the rows and iterations of `pairs`, which they are of, in order.
    They take the place of the parts."""
    of_pairs = np.reshape([(pair.row, pair.iteration) for pair in pairs], logps.shape)
    write_whole(path, _npz(key=key, logps=logps, rows=of_pairs[..., 0], iterations=of_pairs[..., 1]))
    for part in find(path.parent, "part-*.npz"):
        part.unlink()


def read_scores(path: epath.Path, key: str) -> np.ndarray | None:
    """The stored scores; None where there are none, or those of another key, or the file is damaged."""
    found = _read(path, key)
    return None if found is None else found["logps"]


def delete_parts(directory: epath.Path, name: str = "part") -> None:
    """When the scores of a pass are in a file of their own."""
    for part in find(directory, f"{name}-*.npz"):
        part.unlink()


class Parts:
    """The scored batches of a pass that is under way, `every` of them a file, which is called `name`; the first process
    reads and writes them."""

    def __init__(self, directory: epath.Path, key: str, every: int, name: str = "part"):
        self._directory, self._key, self._every, self._name, self._kept = directory, key, every, name, 0

    def read(self) -> list[np.ndarray]:
        """What is there, [pairs of a batch, 2] a batch, without a gap."""
        done = hosts.on_first(self._read)
        self._kept = len(done)
        return done

    def keep(self, done: Sequence[np.ndarray]) -> None:
        """Write the batches that are in no file yet, once they are `every`."""
        new = done[self._kept :]
        if len(new) >= self._every:
            if hosts.is_first():
                arrays = {"logps": np.concatenate(new), "lengths": list(map(len, new))}
                write_whole(self._path(self._kept), _npz(key=self._key, **arrays))
            self._kept = len(done)

    def _read(self) -> list[np.ndarray]:
        done: list[np.ndarray] = []
        while part := _read(self._path(len(done)), self._key):
            done += np.split(part["logps"], np.cumsum(part["lengths"])[:-1])
        return done

    def _path(self, first: int) -> epath.Path:
        return self._directory / f"{self._name}-{first:06d}.npz"


def _npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _read(path: epath.Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None where it is not there, was made for another key, or is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            found = dict(stored)
    except Exception as error:  # noqa: BLE001  zipfile, zlib, numpy and pickle each raise their own
        _LOG.warning("%s is damaged (%s): these pairs are scored anew", path, error)
        return None
    if str(found.get("key")) != key:
        _LOG.warning("%s holds scores of another model, other pairs, batches or programs: they are scored anew", path)
        return None
    return found


# ---- measures


def held_out_rewards(policy_logps: np.ndarray, opponent_logps: np.ndarray, beta: float) -> dict[str, float]:
    """Rewards (equation 4.6) of held-out pairs, from log-probs [pairs, 2]."""
    real, generated = np.asarray(rewards(policy_logps.astype(np.float64), opponent_logps.astype(np.float64), beta)).T
    return {
        "held_out/rewards/accuracy": float(np.mean(real > generated)),
        "held_out/rewards/margin": float(np.mean(real - generated)),
        "held_out/rewards/real": float(np.mean(real)),
        "held_out/rewards/generated": float(np.mean(generated)),
    }


def nats_per_token(pairs: Sequence[Pair], logps: np.ndarray) -> float:
    """A model's mean loss on the human responses as a plain language model, from its log-probs [pairs, 2]."""
    return -float(logps[:, 0].sum(dtype=np.float64)) / sum(len(pair.real) for pair in pairs)
