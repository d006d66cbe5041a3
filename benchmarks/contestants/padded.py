"""The layout that packed rows replace, for comparison: each response in a row of its own, behind a copy of its prompt,
padded to the longest of the batch."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax.data.batch import PackedRows
from spin_jax.data.bin_packing import round_up
from spin_jax.data.pairs import Pair
from spin_jax.models import Execution, ModelConfig
from spin_jax.objectives.logprobs import target_scores
from spin_jax.objectives.margin_losses import logistic, rewards
from spin_jax.objectives.spin import Objective


class PaddedBatch(NamedTuple):
    """Rows of B real responses, then of the B generated ones, and the opponent's log-probs, f32 [B, 2]."""

    rows: PackedRows
    opponent_logps_B2: jax.Array


def padded_batch(pairs: Sequence[Pair], logps: np.ndarray, multiple: int) -> PaddedBatch:
    """`logps`: the opponent's, [pairs, 2]. Lengths are rounded up to `multiple`."""
    sequences = [(pair.prompt, pair.responses[y]) for y in range(2) for pair in pairs]
    length = round_up(max(len(prompt) + len(response) for prompt, response in sequences), multiple)
    targets = round_up(max(len(response) for _, response in sequences), multiple)
    positions_BT = np.tile(np.arange(length, dtype=np.int32), (len(sequences), 1))
    tokens_BT, visible_until_BT = np.zeros_like(positions_BT), positions_BT + 1
    predictor_index_BR, targets_BR = (np.zeros((len(sequences), targets), np.int32) for _ in range(2))
    response_ids_BR = np.full_like(targets_BR, -1)
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        tokens_BT[i, :end] = np.concatenate([prompt, response])
        visible_until_BT[i, :end] = end
        predictor_index_BR[i, : len(response)] = np.arange(len(prompt) - 1, end - 1)
        targets_BR[i, : len(response)] = response
        response_ids_BR[i, : len(response)] = 0
    return PaddedBatch(
        PackedRows(tokens_BT, positions_BT, visible_until_BT, predictor_index_BR, targets_BR, response_ids_BR),
        logps,
    )


def padded_objective(model: ModelConfig, execution: Execution, beta: float) -> Objective:
    """The logistic objective, of padded batches."""

    def logprobs(params: dict, batch: PaddedBatch) -> jax.Array:
        logps_BR = target_scores(model, params, batch.rows, execution).logps
        return jnp.sum(jnp.where(batch.rows.response_ids_BR == 0, logps_BR, 0.0), axis=1).reshape(2, -1).T

    def objective(params: dict, opponent: dict | None, batch: PaddedBatch) -> tuple[jax.Array, tuple]:
        logps_B2 = logprobs(params, batch)
        opponent_B2 = batch.opponent_logps_B2
        if opponent is not None:
            opponent_B2 = jax.lax.stop_gradient(logprobs(opponent, batch))
        rewards_B2 = rewards(logps_B2, opponent_B2, beta)
        loss = jnp.mean(logistic(rewards_B2[:, 0] - rewards_B2[:, 1]))
        return loss, ({"loss": loss, "logps/real": jnp.mean(logps_B2[:, 0])}, logps_B2)

    return objective
