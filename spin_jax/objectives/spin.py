"""L_SPIN (equation 4.7): a loss function of the margin between the real response's reward and the generated one's."""

from collections.abc import Callable

import jax

from spin_jax.data.pairs import RESPONSES
from spin_jax.objectives import margin_losses
from spin_jax.objectives.interface import Objective, Settings, by_response, per_token


def margin_objective(
    loss: Callable[[jax.Array, Settings], jax.Array], *, reads: tuple[str, ...] = (), normalised: bool = False
) -> Objective:
    """The objective whose loss is `loss` of (the margins, `Settings`).

    Args:
        reads: see `Objective`.
        normalised: the margin inside of `loss` is that of rewards a token: beta [ log(p_theta/p_t)(y) / |y| -
            log(p_theta/p_t)(y') / |y'| ]. Metrics are of whole responses all the same, so that runs can be compared.
    """

    def of_pairs(policy_BPY, reference_BPY, lengths_BPY, settings: Settings):
        rewards_BPY = margin_losses.rewards(policy_BPY, reference_BPY, settings.beta)
        metrics = reward_metrics(rewards_BPY)
        margins_BP = metrics["rewards/margin"]
        if normalised:
            normalised_BPY = per_token(rewards_BPY, lengths_BPY)
            margins_BP = normalised_BPY[..., 0] - normalised_BPY[..., 1]
        return loss(margins_BP, settings), metrics | by_response("logps", RESPONSES, policy_BPY)

    return Objective(of_pairs, reads=reads)


def reward_metrics(rewards_BPY: jax.Array, names: tuple[str, ...] = RESPONSES) -> dict[str, jax.Array]:
    """Margin, accuracy and rewards of pairs, [B, P] each, from rewards of a real, a generated and other responses."""
    margins_BP = rewards_BPY[..., 0] - rewards_BPY[..., 1]
    # Accuracy is strict, as in the released code: 0 where policy and opponent are the same.
    metrics = {"rewards/margin": margins_BP, "rewards/accuracy": margins_BP > 0}
    return metrics | by_response("rewards", names, rewards_BPY)


def _of_margin(loss: Callable[[jax.Array], jax.Array]) -> Objective:
    return margin_objective(lambda margins_BP, settings: loss(margins_BP))


logistic, hinge, exponential, correlation = map(
    _of_margin,
    (margin_losses.logistic, margin_losses.hinge, margin_losses.exponential, margin_losses.correlation),
)
