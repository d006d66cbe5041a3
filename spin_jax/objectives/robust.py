"""Robust DPO: an unbiased estimate of the logistic loss where a share e of the pairs is the wrong way round.

    L = [ (1 - e) log(1 + exp(-m)) - e log(1 + exp(m)) ] / (1 - 2 e)  =  log(1 + exp(-m)) - m e / (1 - 2 e)

with m the margin of equation 4.7 and e `config.spin.label_smoothing`. Source: arXiv 2403.00409. l(0) = log 2, l'(0) =
-1 / (2 (1 - 2 e)). Assumption 5.1 holds: a falling line is added to the logistic loss. Like the correlation loss it has
no lower bound.
"""

from spin_jax.objectives.margin_losses import logistic
from spin_jax.objectives.spin import margin_objective


def _loss(margins_BP, settings):
    e = settings.label_smoothing
    return ((1 - e) * logistic(margins_BP) - e * logistic(-margins_BP)) / (1 - 2 * e)


robust = margin_objective(_loss, reads=("label_smoothing",))
