"""SPPO with hard labels: regression of each response's log-ratio to its own target.

    L = ( log(p_theta/p_t)(y) - 1 / (2 beta) )^2  +  ( log(p_theta/p_t)(y') + 1 / (2 beta) )^2

Source: arXiv 2405.00675, equation 4.7 with eta = 1 / beta, where the win rates that it asks of a preference model are 1
of the real response and 0 of the generated one; so TRL's `sppo_hard`. The loss at the start is 1 / (2 beta^2): 50 at
beta 0.1. It is no function of the margin, so that Assumption 5.1 does not speak of it.
"""

from spin_jax.data.pairs import RESPONSES
from spin_jax.objectives.interface import Objective, Settings, by_response
from spin_jax.objectives.margin_losses import rewards
from spin_jax.objectives.spin import reward_metrics


def _of_pairs(policy_BPY, reference_BPY, lengths_BPY, settings: Settings):
    del lengths_BPY
    ratios_BPY, target = policy_BPY - reference_BPY, 1 / (2 * settings.beta)
    loss_BP = (ratios_BPY[..., 0] - target) ** 2 + (ratios_BPY[..., 1] + target) ** 2
    metrics = reward_metrics(rewards(policy_BPY, reference_BPY, settings.beta))
    return loss_BP, metrics | by_response("logps", RESPONSES, policy_BPY)


sppo_hard = Objective(_of_pairs)
