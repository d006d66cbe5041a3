"""Batches as arrays: pairs in packed rows, on the host and on the devices."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np


class Rows(NamedTuple):
    """Rows of pairs, one after the other, each `prompt | response | response`, then padding.

    What a token may see, and who predicts what, travels with the tokens; nothing is inferred from ids. The last token
    of a response predicts nothing and is a target only. The last token of a prompt predicts the first of each response.

    Attributes:
        tokens_BT: int32.
        positions_BT: int32, places of the tokens in their own sequence: both responses go on where the prompt ends.
        ends_BT: int32, the first slot of the row whose token, and all after it, does not see this one: the end of the
            pair, and for the first of two responses its own end.
        sources_BR: int32, slots of the tokens that predict the targets.
        targets_BR: int32, the tokens of the responses, a stop id only where a response really ended.
        owners_BR: int32, which of its row's responses a target belongs to; -1 is padding.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    ends_BT: jax.Array
    sources_BR: jax.Array
    targets_BR: jax.Array
    owners_BR: jax.Array


class Batch(NamedTuple):
    """Pairs in packed rows, at most P in each. For supervised fine-tuning their generated responses are empty.

    A loss, its metrics and its gradient are sums over the batch's pairs, each with its weight: they are the same
    however the pairs share rows, and however the rows are cut into micro-batches.

    Attributes:
        rows: the first two responses of a row are the real and the generated one of its first pair, and so on.
        weights_BP: f32, what a pair counts; 0 where a row has fewer pairs. For SPIN 1 / pairs of the whole batch; for
            supervised fine-tuning 1 / response tokens of the whole batch.
        opponent_logps_BP2: f32, stored log p_t of real and generated responses, in nats; not read with a live opponent,
            nor for supervised fine-tuning.
    """

    rows: Rows
    weights_BP: jax.Array
    opponent_logps_BP2: jax.Array


class Shape(NamedTuple):
    """What a program is compiled for: `rows` rows of `length` tokens, each with `targets` response tokens of at most
    `pairs` pairs."""

    rows: int
    length: int
    targets: int
    pairs: int


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """A batch on its way to the devices.

    Attributes:
        arrays: numpy arrays.
        rows: numbers of its pairs' rows in the data set.
        facts: scalars known without a device (mean lengths, shares cut, fill), logged beside the step's metrics.
        tokens: slots of its rows that are not padding.
        flops: model FLOPs of one forward pass: what the mathematics needs, a prompt once for both its responses,
            nothing for padding.
    """

    arrays: Batch
    rows: np.ndarray
    facts: dict[str, float]
    tokens: int
    flops: float


def empty_batch(shape: Shape) -> Batch:
    """Padding alone: each token a sequence of its own, no targets."""
    tokens, targets = (shape.rows, shape.length), (shape.rows, shape.targets)
    ends_BT = np.broadcast_to(np.arange(1, shape.length + 1, dtype=np.int32), tokens).copy()
    zeros_BT, zeros_BR = (functools.partial(np.zeros, size, np.int32) for size in (tokens, targets))
    rows = Rows(zeros_BT(), zeros_BT(), ends_BT, zeros_BR(), zeros_BR(), np.full(targets, -1, np.int32))
    pairs = (shape.rows, shape.pairs)
    return Batch(rows, np.zeros(pairs, np.float32), np.zeros((*pairs, 2), np.float32))
