"""Rows of token ids to batches: which rows a step takes, how they are padded, what they cost."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.data.pairs import Pair
from spin_jax.errors import UserError
from spin_jax.logprobs import Rows
from spin_jax.models import ModelConfig, flops_per_token, unembed_flops
from spin_jax.step import PairBatch, SftBatch


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """A batch on its way to the devices.

    Attributes:
        arrays: numpy arrays, a `PairBatch` or `SftBatch`.
        rows: numbers of its rows in the data set.
        facts: scalars known without a device (mean lengths, shares cut), logged beside the step's metrics.
        tokens: tokens that are not padding.
        flops: model FLOPs of one forward pass over them: what the mathematics needs, nothing for padding.
    """

    arrays: NamedTuple
    rows: np.ndarray
    facts: dict[str, float]
    tokens: int
    flops: float


def put(arrays, sharding: jax.sharding.Sharding):
    """A tree of host arrays that all processes have, on the devices: a process sends its own devices their rows."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of a small array that is split over a mesh, on every process."""
    if not array.is_fully_addressable:
        array = jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
    return np.asarray(array)


def num_steps(rows: int, epochs: float, batch_size: int) -> int:
    """Optimizer steps in `epochs` passes over `rows`; only what fills no batch at the very end is left out.

    Raises:
        UserError: not even one batch comes together.
    """
    steps = math.floor(rows * epochs / batch_size + 1e-9)
    if not steps:
        raise UserError(
            f"{rows} rows x {epochs:g} epochs do not fill one batch of {batch_size}: lower config.train.batch_size, or "
            "raise config.train.epochs"
        )
    return steps


def batch_indices(rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of `rows` step `step` takes: the next `batch_size` places of an endless row of shuffles, one an epoch.

    A function of its arguments alone: a resumed run goes on with the same rows, whatever it was that stopped it.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    shuffles = {epoch: np.random.default_rng((seed, epoch)).permutation(rows) for epoch in np.unique(places // rows)}
    return np.array([shuffles[place // rows][place % rows] for place in places])


@dataclasses.dataclass(frozen=True)
class Padding:
    """How long padded rows are: the longest row's tokens rounded up to `multiple`, never more than `longest` tokens.

    Every length is a program to compile; a multiple of 0 means `longest` always, hence one program.
    """

    multiple: int
    longest: int

    def __call__(self, tokens: int) -> int:
        return min(self.longest, -(-tokens // self.multiple) * self.multiple) if self.multiple else self.longest


def pair_batch(model: ModelConfig, pairs: Sequence[Pair], padding: Padding) -> HostBatch:
    """Pairs as a `PairBatch`: real responses first along its axis of 2. Unscored pairs get NaN as opponent
    log-probs."""
    responses = [(pair.real, pair.generated) for pair in pairs]
    response_lengths_B2 = np.array([[len(real), len(generated)] for real, generated in responses], np.int32)
    prompt_lengths_B = np.array([len(pair.prompt) for pair in pairs], np.int32)
    lengths_B2 = prompt_lengths_B[:, None] + response_lengths_B2
    rows = [
        np.concatenate([pair.prompt, response]) for pair, two in zip(pairs, responses, strict=True) for response in two
    ]
    arrays = PairBatch(
        tokens_B2T=_right_padded(rows, padding(lengths_B2.max())).reshape(len(pairs), 2, -1),
        prompt_lengths_B=prompt_lengths_B,
        responses_B2R=_right_padded([y for two in responses for y in two], padding(response_lengths_B2.max())).reshape(
            len(pairs), 2, -1
        ),
        response_lengths_B2=response_lengths_B2,
        opponent_logps_B2=np.array([(pair.real_logp, pair.generated_logp) for pair in pairs], np.float32),
    )
    facts = {
        "lengths/real": float(response_lengths_B2[:, 0].mean()),
        "lengths/generated": float(response_lengths_B2[:, 1].mean()),
        "cut/real": float(np.mean([pair.real_cut for pair in pairs])),
        "cut/generated": float(np.mean([pair.generated_cut for pair in pairs])),
    }
    return HostBatch(
        arrays,
        np.array([pair.row for pair in pairs]),
        facts,
        int(lengths_B2.sum()),
        forward_flops(model, lengths_B2, response_lengths_B2),
    )


def sft_batch(model: ModelConfig, pairs: Sequence[Pair], padding: Padding) -> HostBatch:
    """The real responses of pairs as an `SftBatch`."""
    prompt_lengths_B = np.array([len(pair.prompt) for pair in pairs], np.int32)
    response_lengths_B = np.array([len(pair.real) for pair in pairs], np.int32)
    lengths_B = prompt_lengths_B + response_lengths_B
    rows = Rows(
        tokens_BT=_right_padded([np.concatenate([pair.prompt, pair.real]) for pair in pairs], padding(lengths_B.max())),
        prompt_lengths_B=prompt_lengths_B,
        responses_BR=_right_padded([pair.real for pair in pairs], padding(response_lengths_B.max())),
        response_lengths_B=response_lengths_B,
    )
    weights_B = np.full(len(pairs), len(pairs) / response_lengths_B.sum(), np.float32)
    facts = {"lengths/real": float(response_lengths_B.mean())}
    return HostBatch(
        SftBatch(rows, weights_B),
        np.array([pair.row for pair in pairs]),
        facts,
        int(lengths_B.sum()),
        forward_flops(model, lengths_B, response_lengths_B),
    )


def forward_flops(model: ModelConfig, lengths: np.ndarray, scored: np.ndarray) -> float:
    """Matmul FLOPs of a forward pass over causal rows of `lengths` tokens, of which `scored` positions reach the
    vocabulary. With a sliding window a token counts the keys inside it."""
    total = 0.0
    for length, targets in zip(lengths.flat, scored.flat, strict=True):
        seen = np.minimum(np.arange(1, length + 1), model.sliding_window or length)
        total += length * flops_per_token(model, seen.mean()) + targets * unembed_flops(model)
    return float(total)


def _right_padded(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """int32 [len(rows), length]; the padding is id 0, which nobody reads."""
    padded = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
