"""What an objective is, and how it becomes the loss of a batch."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spin_jax.config import SpinConfig, at_iteration
from spin_jax.data.batch import Batch
from spin_jax.data.pairs import ALL_RESPONSES, RESPONSES
from spin_jax.errors import UserError, as_flag
from spin_jax.models import Execution, ModelConfig
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.logprobs import Scores, pair_logprobs, pair_scores


class Settings(NamedTuple):
    """What objectives read of `config.spin`, at one iteration; config/training.py documents each.

    Attributes:
        beta: lambda of equation 4.7.
        nll_weight: weight of the real response's NLL, which `Objective.of_pairs` adds to any loss.
        label_smoothing, noise_ratio, history_weight: read by the objectives that name them (`Objective.reads`).
    """

    beta: float = 0.1
    nll_weight: float = 0.0
    label_smoothing: float = 0.0
    noise_ratio: float = 1.0
    history_weight: float = 0.0

    @classmethod
    def at(cls, spin: SpinConfig, t: int) -> "Settings":
        """Those of iteration t."""
        values = {name: getattr(spin, name) for name in cls._fields}
        return cls(**{name: at_iteration(v, t) if isinstance(v, tuple) else v for name, v in values.items()})


# of one batch: f32 [B, P], {name: metric [B, P]}
PairLosses = tuple[jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss for each pair, from log-probs of its responses.

    Attributes:
        loss: (policy log-probs f32 [B, P, Y], the reference's [B, P, Y] or None, lengths int32 [B, P, Y] in tokens,
            `Settings`) -> (loss f32 [B, P], {name: metric [B, P]}). Log-probs are sums over tokens, in nats. Where a
            row has fewer pairs than P, all three are 0, and the loss must be finite.
        responses: what the Y responses to a prompt are, in order, such as ("real", "generated").
        reference: whether it needs the reference's log-probs; None is given in their place otherwise.
        mean_over: "pairs", or "tokens" for the mean over all response tokens of a batch.
        reads: fields of `Settings` that it reads beside `beta`. Others that a config sets are refused.
    """

    loss: Callable[[jax.Array, jax.Array | None, jax.Array, Settings], PairLosses]
    responses: tuple[str, ...] = RESPONSES
    reference: bool = True
    mean_over: str = "pairs"
    reads: tuple[str, ...] = ()

    def of_pairs(
        self, policy_BPY: jax.Array, reference_BPY: jax.Array | None, lengths_BPY: jax.Array, settings: Settings
    ) -> PairLosses:
        """`loss`, and what is added to any of them: nll_weight * (-log p(y|x) / |y|) of the real response y, in nats a
        token, as arXiv 2404.19733 adds it. Metrics then hold both addends."""
        loss_BP, metrics = self.loss(policy_BPY, reference_BPY, lengths_BPY, settings)
        if not settings.nll_weight:
            return loss_BP, metrics
        nll_BP = -per_token(policy_BPY, lengths_BPY)[..., self.responses.index("real")]
        return loss_BP + settings.nll_weight * nll_BP, metrics | {"loss/objective": loss_BP, "loss/nll": nll_BP}

    def at_start(self, settings: Settings) -> float | None:
        """`loss` where policy and reference are the same function; None if that does not decide it."""
        if not self.reference:
            return None
        zeros_BPY = jnp.zeros((1, 1, len(self.responses)), jnp.float32)
        return float(self.loss(zeros_BPY, zeros_BPY, jnp.ones_like(zeros_BPY, jnp.int32), settings)[0][0, 0])


def check_objective(spin: SpinConfig) -> None:
    """Refuse an objective whose responses a run does not have, and settings that it does not read.

    Raises:
        UserError: one line with the field, and what to write instead.
    """
    objective, chosen = OBJECTIVES[spin.loss], as_flag("spin.loss", spin.loss)
    if missing := [response for response in objective.responses if response not in ALL_RESPONSES]:
        raise UserError(
            f"{chosen} needs a response called {missing[0]!r}, and a pair has {', '.join(ALL_RESPONSES)}: name these "
            "in its Objective(responses=...)"
        )
    default, read = SpinConfig(), {"beta", *objective.reads}
    if objective.mean_over == "pairs" and "real" in objective.responses:
        read.add("nll_weight")
    if objective.reference:
        read.add("opponent_share")
    for name in (*Settings._fields, "opponent_share"):
        if name not in read and getattr(spin, name) != getattr(default, name):
            given, was = (as_flag(f"spin.{name}", getattr(s, name)) for s in (spin, default))
            raise UserError(f"{given} is not read by {chosen}: leave it at {was}, or choose another loss")
    if "label_smoothing" in objective.reads and not spin.label_smoothing:
        raise UserError(f"{chosen} is logistic without label smoothing: write --config.spin.label_smoothing=0.1")
    if spin.opponent_share < 1 and spin.opponent == "live":
        raise UserError(
            f"{as_flag('spin.opponent_share', spin.opponent_share)} needs log-probs of two models, which are stored "
            "before training: write --config.spin.opponent=stored"
        )


# (params, opponent's params or None, batch) -> (loss, (metrics, log-probs of the batch's responses [B, P, Y]))
BatchLoss = Callable[[dict, dict | None, Batch], tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]]


def batch_loss(objective: Objective, settings: Settings, model: ModelConfig, execution: Execution) -> BatchLoss:
    """The objective as a function of params. The reference's log-probs are the batch's, or are computed live where the
    opponent's params are given. Loss and metrics are sums over pairs, each with its weight."""

    def loss(params: dict, opponent: dict | None, batch: Batch) -> tuple[jax.Array, tuple]:
        scores, lengths_BPY = pair_scores(model, params, batch, execution), response_lengths(batch)
        reference_BPY = batch.reference_logps_BPY if objective.reference else None
        if objective.reference and opponent is not None:
            reference_BPY = jax.lax.stop_gradient(pair_logprobs(model, opponent, batch, execution))
        with jax.named_scope("loss"):
            loss_BP, metrics_BP = objective.of_pairs(scores.logps, reference_BPY, lengths_BPY, settings)
            metrics_BP |= {"loss": loss_BP} | token_metrics(objective, scores, reference_BPY, lengths_BPY)
            metrics = jax.tree.map(lambda x_BP: jnp.sum(batch.weights_BP * x_BP), metrics_BP)
        return metrics["loss"], (metrics, scores.logps)

    return loss


def token_metrics(
    objective: Objective, scores: Scores, reference_BPY: jax.Array | None, lengths_BPY: jax.Array
) -> dict[str, jax.Array]:
    """What is told of each response's tokens whatever the loss: means over a response's tokens, or sums where the
    batch's weights make the mean over all tokens of them.

    `kl/generated` estimates KL(opponent || policy) a token, from what the opponent has drawn: log p_t(y') - log
    p_theta(y'). It is no more than that mean where others wrote y', an earlier opponent or the data's authors; and of a
    mixed reference where that is a mixture.
    """
    names = objective.responses

    def mean(x_BPY: jax.Array) -> jax.Array:
        return per_token(x_BPY, lengths_BPY) if objective.mean_over == "pairs" else x_BPY

    metrics = by_response("logps_per_token", names, mean(scores.logps))
    metrics |= by_response("entropy", names, mean(scores.entropy))
    metrics |= by_response("token_accuracy", names, mean(scores.correct))
    if reference_BPY is not None and "generated" in names:
        metrics["kl/generated"] = mean(reference_BPY - scores.logps)[..., names.index("generated")]
    return metrics


def response_lengths(batch: Batch) -> jax.Array:
    """Tokens of each response, int32 [B, P, Y]."""
    shape = batch.reference_logps_BPY.shape
    ids_Z = jnp.arange(shape[1] * shape[2], dtype=jnp.int32)
    own_BRZ = batch.rows.response_ids_BR[:, :, None] == ids_Z[None, None]
    return jnp.sum(own_BRZ, axis=1, dtype=jnp.int32).reshape(shape)


def per_token(x_BPY: jax.Array, lengths_BPY: jax.Array) -> jax.Array:
    """Sums over the tokens of responses as means; 0 of an empty response."""
    return x_BPY / jnp.maximum(lengths_BPY, 1)


def by_response(prefix: str, names: tuple[str, ...], x_BPY: jax.Array) -> dict[str, jax.Array]:
    """{"prefix/name": [B, P]} of each response."""
    return {f"{prefix}/{name}": x_BPY[..., y] for y, name in enumerate(names)}
