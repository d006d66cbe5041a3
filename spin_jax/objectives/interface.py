"""What an objective is, and how it becomes the loss of a batch."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spin_jax.data.batch import Batch
from spin_jax.data.pairs import RESPONSES
from spin_jax.models import Execution, ModelConfig
from spin_jax.objectives.logprobs import pair_logprobs


class Settings(NamedTuple):
    """What an objective reads of `config.spin`, at one iteration.

    Attributes:
        beta: lambda of equation 4.7.
    """

    beta: float = 0.1


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss for each pair, from log-probs of its responses.

    Attributes:
        loss: (policy log-probs f32 [B, P, Y], the reference's [B, P, Y] or None, lengths int32 [B, P, Y] in tokens,
            `Settings`) -> (loss f32 [B, P], {name: metric [B, P]}). Log-probs are sums over tokens, in nats.
        responses: what the Y responses to a prompt are, in order, such as ("real", "generated").
        reference: whether it needs the reference's log-probs; None is given in their place otherwise.
        mean_over: "pairs", or "tokens" for the mean over all response tokens of a batch.
    """

    loss: Callable[[jax.Array, jax.Array | None, jax.Array, Settings], tuple[jax.Array, dict[str, jax.Array]]]
    responses: tuple[str, ...] = RESPONSES
    reference: bool = True
    mean_over: str = "pairs"

    def at_start(self, settings: Settings) -> float | None:
        """The loss where policy and reference are the same function; None if that does not decide it."""
        if not self.reference:
            return None
        zeros_BPY = jnp.zeros((1, 1, len(self.responses)), jnp.float32)
        return float(self.loss(zeros_BPY, zeros_BPY, jnp.ones_like(zeros_BPY, jnp.int32), settings)[0][0, 0])


# (params, opponent's params or None, batch) -> (loss, (metrics, log-probs of the batch's responses [B, P, Y]))
BatchLoss = Callable[[dict, dict | None, Batch], tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]]


def batch_loss(objective: Objective, settings: Settings, model: ModelConfig, execution: Execution) -> BatchLoss:
    """The objective as a function of params. The reference's log-probs are the batch's, or are computed live where the
    opponent's params are given. Loss and metrics are sums over pairs, each with its weight."""

    def loss(params: dict, opponent: dict | None, batch: Batch) -> tuple[jax.Array, tuple]:
        policy_BPY = pair_logprobs(model, params, batch, execution)
        reference_BPY = batch.reference_logps_BPY if objective.reference else None
        if objective.reference and opponent is not None:
            reference_BPY = jax.lax.stop_gradient(pair_logprobs(model, opponent, batch, execution))
        with jax.named_scope("loss"):
            loss_BP, metrics_BP = objective.loss(policy_BPY, reference_BPY, response_lengths(batch), settings)
            metrics = jax.tree.map(lambda x_BP: jnp.sum(batch.weights_BP * x_BP), {"loss": loss_BP} | metrics_BP)
        return metrics["loss"], (metrics, policy_BPY)

    return loss


def response_lengths(batch: Batch) -> jax.Array:
    """Tokens of each response, int32 [B, P, Y]."""
    shape = batch.reference_logps_BPY.shape
    ids_Z = jnp.arange(shape[1] * shape[2], dtype=jnp.int32)
    own_BRZ = batch.rows.response_ids_BR[:, :, None] == ids_Z[None, None]
    return jnp.sum(own_BRZ, axis=1, dtype=jnp.int32).reshape(shape)


def by_response(prefix: str, names: tuple[str, ...], x_BPY: jax.Array) -> dict[str, jax.Array]:
    """{"prefix/name": [B, P]} of each response."""
    return {f"{prefix}/{name}": x_BPY[..., y] for y, name in enumerate(names)}
