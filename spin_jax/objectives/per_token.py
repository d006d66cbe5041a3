"""The logistic loss of rewards a token.

    L = log(1 + exp(-m)),   m = beta [ log(p_theta/p_t)(y) / |y|  -  log(p_theta/p_t)(y') / |y'| ]

|y| is the number of tokens, with the stop id where a response really ends. Source: TRL's `sigmoid_norm`; SimPO (arXiv
2405.14734) has the same margin without a reference. l(0) = log 2, l'(0) = -1/2. Assumption 5.1 holds for l; that m is
another one than in equation 4.7 changes the minimiser (docs/objectives.md). Margins are smaller by the number of
tokens: beta wants to be larger by as much.
"""

from spin_jax.objectives import margin_losses
from spin_jax.objectives.spin import margin_objective

logistic = margin_objective(lambda margins_BP, settings: margin_losses.logistic(margins_BP), normalised=True)
