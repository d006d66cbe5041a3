"""The scoring stage: the opponent's log-probs of every pair, computed once an iteration and stored."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from spin_jax import hosts, stopping
from spin_jax.batches import HostBatch, fetch, put
from spin_jax.data.pairs import Pair
from spin_jax.errors import UserError
from spin_jax.metrics import write_whole


def score(
    logprobs: Callable,
    params: dict,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    make_batch: Callable[[Sequence[Pair]], HostBatch],
    sharding: jax.sharding.NamedSharding,
    name: str,
) -> np.ndarray:
    """log p(y|x) of the real and the generated response of each pair under `params`, in nats, f32 [pairs, 2].

    `logprobs` is the jitted `step.pair_logprobs`: the very function that training differentiates. Pairs of like length
    are scored together; the last batch is filled up with copies of its last pair. Each process computes the rows of its
    devices, and all get all scores.
    """
    order = sorted(
        range(len(pairs)),
        key=lambda i: len(pairs[i].prompt) + max(len(pairs[i].real), len(pairs[i].generated)),
        reverse=True,  # longest first: if something does not fit, it shows at once
    )
    logps = np.zeros((len(pairs), 2), np.float32)
    with tqdm(total=len(pairs), desc=name, unit="pair", disable=not hosts.is_first()) as bar:
        for start in range(0, len(pairs), batch_size):
            stopping.between_batches()
            chosen = order[start : start + batch_size]
            filled = chosen + chosen[-1:] * (batch_size - len(chosen))
            batch = make_batch([pairs[i] for i in filled])
            scored = logprobs(params, put(batch.arrays, sharding))
            logps[chosen] = fetch(scored)[: len(chosen)]
            bar.update(len(chosen))
    return logps


def with_scores(pairs: Sequence[Pair], logps: np.ndarray) -> list[Pair]:
    """The pairs, carrying their opponent log-probs [pairs, 2]."""
    return [
        dataclasses.replace(pair, real_logp=float(real), generated_logp=float(generated))
        for pair, (real, generated) in zip(pairs, logps, strict=True)
    ]


def fingerprint(pairs: Sequence[Pair]) -> str:
    """A hash of all token ids of the pairs, in order: scores belong to these rows and to no others."""
    digest = hashlib.sha256()
    for pair in pairs:
        for tokens in (pair.prompt, pair.real, pair.generated):
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()


def write_scores(path: epath.Path, pairs: Sequence[Pair], logps: np.ndarray) -> None:
    """Store the scores of `pairs` with the pairs' fingerprint."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        logps=logps,
        rows=[p.row for p in pairs],
        iterations=[p.iteration for p in pairs],
        fingerprint=fingerprint(pairs),
    )
    write_whole(path, buffer.getvalue())


def read_scores(path: epath.Path, pairs: Sequence[Pair]) -> np.ndarray:
    """The stored scores of `pairs`, f32 [pairs, 2].

    Raises:
        UserError: the file was made for other pairs.
    """
    with np.load(io.BytesIO(path.read_bytes())) as stored:
        if str(stored["fingerprint"]) != fingerprint(pairs):
            raise UserError(f"{path} holds scores of other rows than this run's: delete it, and it is made anew")
        return stored["logps"]
