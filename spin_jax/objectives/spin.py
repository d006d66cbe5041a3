"""L_SPIN (equation 4.7): a loss function of the margin between the real response's reward and the generated one's."""

from collections.abc import Callable

import jax

from spin_jax.data.pairs import RESPONSES
from spin_jax.objectives import margin_losses
from spin_jax.objectives.interface import Objective, Settings, by_response


def margin_objective(loss: Callable[[jax.Array], jax.Array]) -> Objective:
    """The objective whose loss is `loss` of the margin."""

    def of_pairs(policy_BPY, reference_BPY, lengths_BPY, settings: Settings):
        del lengths_BPY
        rewards_BPY = margin_losses.rewards(policy_BPY, reference_BPY, settings.beta)
        margins_BP = rewards_BPY[..., 0] - rewards_BPY[..., 1]
        # Accuracy is strict, as in the released code: 0 where policy and opponent are the same.
        metrics = {"rewards/margin": margins_BP, "rewards/accuracy": margins_BP > 0}
        metrics |= by_response("rewards", RESPONSES, rewards_BPY)
        return loss(margins_BP), metrics | by_response("logps", RESPONSES, policy_BPY)

    return Objective(of_pairs)


logistic, hinge, exponential, correlation = map(
    margin_objective,
    (margin_losses.logistic, margin_losses.hinge, margin_losses.exponential, margin_losses.correlation),
)
