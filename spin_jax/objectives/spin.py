"""The SPIN objective (equation 4.7)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spin_jax.data.batch import Batch
from spin_jax.models import Compute, ModelConfig
from spin_jax.objectives.logprobs import pair_logprobs
from spin_jax.objectives.margin_losses import LOSSES, rewards

# (params, opponent or None, batch) -> (loss, (metrics, log-probs of the batch's responses [B, P, 2]))
Objective = Callable[[dict, dict | None, NamedTuple], tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]]


def spin_objective(config: ModelConfig, compute: Compute, loss: str, beta: float) -> Objective:
    """L_SPIN of equation 4.7 with the opponent's log-probs from the batch, or live where opponent params are given."""

    def objective(params: dict, opponent: dict | None, batch: Batch) -> tuple[jax.Array, tuple]:
        logps_BP2 = pair_logprobs(config, params, batch, compute)
        if opponent is None:
            opponent_BP2 = batch.opponent_logps_BP2
        else:
            opponent_BP2 = jax.lax.stop_gradient(pair_logprobs(config, opponent, batch, compute))

        def mean(x_BP: jax.Array) -> jax.Array:
            return jnp.sum(batch.weights_BP * x_BP)

        with jax.named_scope("loss"):
            rewards_BP2 = rewards(logps_BP2, opponent_BP2, beta)
            margins_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
            metrics = {
                "loss": mean(LOSSES[loss](margins_BP)),
                "rewards/real": mean(rewards_BP2[..., 0]),
                "rewards/generated": mean(rewards_BP2[..., 1]),
                "rewards/margin": mean(margins_BP),
                # Strict, as in the released code: 0 where policy and opponent are the same.
                "rewards/accuracy": mean(margins_BP > 0),
                "logps/real": mean(logps_BP2[..., 0]),
                "logps/generated": mean(logps_BP2[..., 1]),
            }
        return metrics["loss"], (metrics, logps_BP2)

    return objective
