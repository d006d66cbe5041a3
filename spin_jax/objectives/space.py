"""SPACE: noise-contrastive estimation, which asks of each response alone whether it is real.

    L = -log s_mu( r(y) )  -  mu log s_{1/mu}( -r(y') ),   s_mu(r) = 1 / (1 + mu exp(-r)),   r = beta log(p_theta/p_t)

Source: arXiv 2512.07175, where r has no beta: write --config.spin.beta="(1.0,)" for the paper's. mu is
`config.spin.noise_ratio`, the paper's ratio of generated to real responses, 1 in its runs. With mu = 1 it is TRL's
`bco_pair`. The loss at the start is log(1 + mu) + mu log(1 + 1/mu): 2 log 2 at mu 1. It is no function of the margin,
so that Assumption 5.1 does not speak of it.
"""

import math

import jax

from spin_jax.data.pairs import RESPONSES
from spin_jax.objectives import margin_losses
from spin_jax.objectives.interface import Objective, Settings, by_response
from spin_jax.objectives.spin import reward_metrics


def _of_pairs(policy_BPY, reference_BPY, lengths_BPY, settings: Settings):
    del lengths_BPY
    rewards_BPY, mu = margin_losses.rewards(policy_BPY, reference_BPY, settings.beta), settings.noise_ratio
    # -log s_mu(r) = softplus(log mu - r), and -log s_{1/mu}(-r) = softplus(r - log mu)
    logits_BPY = rewards_BPY - math.log(mu)
    loss_BP = jax.nn.softplus(-logits_BPY[..., 0]) + mu * jax.nn.softplus(logits_BPY[..., 1])
    return loss_BP, reward_metrics(rewards_BPY) | by_response("logps", RESPONSES, policy_BPY)


space = Objective(_of_pairs, reads=("noise_ratio",))
