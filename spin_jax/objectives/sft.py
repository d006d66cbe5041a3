"""The objective of supervised fine-tuning."""

import jax
import jax.numpy as jnp

from spin_jax.data.batch import Batch
from spin_jax.models import Compute, ModelConfig
from spin_jax.objectives.logprobs import pair_logprobs
from spin_jax.objectives.spin import Objective


def sft_objective(config: ModelConfig, compute: Compute) -> Objective:
    """Mean over response tokens of -log p(y_j | x, y_<j): plain supervised fine-tuning."""

    def objective(params: dict, opponent: None, batch: Batch) -> tuple[jax.Array, tuple]:
        del opponent
        logps_BP2 = pair_logprobs(config, params, batch, compute)
        with jax.named_scope("loss"):
            loss = -jnp.sum(logps_BP2[..., 0] * batch.weights_BP)
        return loss, ({"loss": loss}, logps_BP2)

    return objective
