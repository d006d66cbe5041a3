"""T-SPIN: the real response against the generated one, and that against the one of theta_0; without a reference.

    L = l( beta [ log p(y) - log p(y') ] )  +  b l( beta [ log p(y') - log p(y_0) ] ),   l(m) = log(1 + exp(-m))

y_0, "proto", is the response that theta_0 wrote to the same prompt: iteration 0's generated one, which it equals at
iteration 0. Source: arXiv 2601.08198, as we read it (docs/objectives.md): its equation 7 put together of 4 and 6, its
alpha is our beta (1 in its runs), and its beta our b, `config.spin.history_weight` (0 at iteration 0, then 0.1).

A reward is beta log p_theta(y). Nothing is 0 at the start, so that the first loss is not known beforehand.
"""

from spin_jax.objectives.interface import Objective, Settings, by_response
from spin_jax.objectives.margin_losses import logistic
from spin_jax.objectives.spin import reward_metrics

NAMES = ("real", "generated", "proto")


def _of_pairs(policy_BPY, reference_BPY, lengths_BPY, settings: Settings):
    del reference_BPY, lengths_BPY
    rewards_BPY = settings.beta * policy_BPY
    metrics = reward_metrics(rewards_BPY, NAMES)
    history_BP = rewards_BPY[..., 1] - rewards_BPY[..., 2]
    loss_BP = logistic(metrics["rewards/margin"]) + settings.history_weight * logistic(history_BP)
    return loss_BP, metrics | {"rewards/history_margin": history_BP} | by_response("logps", NAMES, policy_BPY)


tspin = Objective(_of_pairs, NAMES, reference=False, reads=("history_weight",))
