"""Batches as arrays: pairs in packed rows, on the host and on the devices."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np


class PackedRows(NamedTuple):
    """Rows of pairs, one after the other, each `prompt | response | response ...`, then padding.

    Arrays beside the tokens say what each token may see, and which token predicts which target; nothing is inferred
    from ids. The last token of a prompt predicts the first token of each response. The last token of a response
    predicts nothing, so it is a target only.

    Attributes:
        tokens_BT: int32.
        positions_BT: int32, places of the tokens in their own sequence. Each response goes on where the prompt ends.
        visible_until_BT: int32. Tokens from this slot of the row on do not see the token. For a prompt it is the end of
            the pair, for a response its own end.
        predictor_index_BR: int32, slots of the tokens that predict the targets.
        targets_BR: int32, the tokens of the responses, a stop id only where a response really ended.
        response_ids_BR: int32, which of its row's responses a target belongs to; -1 is padding.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    visible_until_BT: jax.Array
    predictor_index_BR: jax.Array
    targets_BR: jax.Array
    response_ids_BR: jax.Array


class Batch(NamedTuple):
    """Pairs in packed rows, at most P in each row, with at most Y responses to each prompt.

    The loss, its metrics and its gradient are sums over the batch's pairs, each times its weight. So they do not depend
    on which pairs share a row, or on how rows are cut into micro-batches.

    Attributes:
        rows: response y of a row's pair p has the id p Y + y.
        weights_BP: f32, weight of a pair; 0 where a row has fewer pairs. It is 1 / pairs of the whole batch for a mean
            over pairs, and 1 / response tokens of the whole batch for a mean over tokens.
        reference_logps_BPY: f32, stored log p_t of the responses, in nats. With a live opponent, or an objective
            without a reference, nobody reads it.
    """

    rows: PackedRows
    weights_BP: jax.Array
    reference_logps_BPY: jax.Array


class Shape(NamedTuple):
    """What a program is compiled for: `rows` rows of `length` tokens, each with `targets` response tokens of at most
    `pairs` pairs, which have at most `responses` responses each."""

    rows: int
    length: int
    targets: int
    pairs: int
    responses: int


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """A batch on the host.

    Attributes:
        arrays: numpy arrays.
        rows: row numbers in the data set, of each pair.
        host_metrics: metrics that need no device: mean lengths, shares truncated, fill.
        tokens: slots of its rows that are not padding.
        flops: model FLOPs of one forward pass. A prompt counts once for all its responses, and padding does not count.
    """

    arrays: Batch
    rows: np.ndarray
    host_metrics: dict[str, float]
    tokens: int
    flops: float


def empty_batch(shape: Shape) -> Batch:
    """Make a batch of padding: each token is a sequence of its own, and there are no targets."""
    tokens, targets = (shape.rows, shape.length), (shape.rows, shape.targets)
    visible_until_BT = np.broadcast_to(np.arange(1, shape.length + 1, dtype=np.int32), tokens).copy()
    by_token: list[Any] = [np.zeros(tokens, np.int32), np.zeros(tokens, np.int32), visible_until_BT]
    by_target: list[Any] = [np.zeros(targets, np.int32), np.zeros(targets, np.int32), np.full(targets, -1, np.int32)]
    by_pair: list[Any] = [np.zeros((shape.rows, shape.pairs, *rest), np.float32) for rest in ((), (shape.responses,))]
    return Batch(PackedRows(*by_token, *by_target), *by_pair)
