"""Log-probs of pairs: the scoring stage, which computes and stores the opponent's once an iteration; what they tell."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from spin_jax import hosts, stopping
from spin_jax.batches import Plan, fetch, put, spin_batch
from spin_jax.data.pairs import Pair
from spin_jax.errors import UserError
from spin_jax.files import write_whole
from spin_jax.losses import rewards
from spin_jax.models import ModelConfig


def score(
    logprobs: Callable,
    params: dict,
    model: ModelConfig,
    pairs: Sequence[Pair],
    plan: Plan,
    *,
    sharding: jax.sharding.NamedSharding,
    name: str,
) -> np.ndarray:
    """log p(y|x) of the real and the generated response of each pair under `params`, in nats, f32 [pairs, 2].

    `logprobs` is the jitted `step.pair_logprobs`: the very function that training differentiates. Each process computes
    the rows of its devices, and all get all scores.
    """
    logps = np.zeros((len(pairs), 2), np.float32)
    with tqdm(total=len(pairs), desc=name, unit="pair", disable=not hosts.is_first()) as bar:
        for rows, shape in zip(plan.batches, plan.shapes, strict=True):
            stopping.between_batches()
            batch = spin_batch(model, pairs, rows, shape)
            scored_BP2 = fetch(logprobs(params, put(batch.arrays, sharding)))
            for row, numbers in enumerate(rows):
                logps[numbers] = scored_BP2[row, : len(numbers)]
            bar.update(len(batch.rows))
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


def held_out_rewards(policy: Sequence[Pair], opponent: Sequence[Pair], beta: float) -> dict[str, float]:
    """Rewards (equation 4.6) of the same held-out pairs, scored by policy and opponent."""
    logps = [np.array([(pair.real_logp, pair.generated_logp) for pair in scored]) for scored in (policy, opponent)]
    real, generated = np.asarray(rewards(*logps, beta)).T
    return {
        "held_out/rewards/accuracy": float(np.mean(real > generated)),
        "held_out/rewards/margin": float(np.mean(real - generated)),
        "held_out/rewards/real": float(np.mean(real)),
        "held_out/rewards/generated": float(np.mean(generated)),
    }


def nats_per_token(scored: Sequence[Pair]) -> float:
    """The model's mean loss on the human responses as a plain language model."""
    return -sum(pair.real_logp for pair in scored) / sum(len(pair.real) for pair in scored)
