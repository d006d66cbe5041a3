"""IPO: regression of the log-ratio difference h to a bounded target.

    L = ( h - 1 / (2 beta) )^2,   h = log(p_theta/p_t)(y) - log(p_theta/p_t)(y')

Source: arXiv 2310.12036, equation 17, whose tau is beta here. l(0) = 1 / (4 beta^2): 25 at beta 0.1. As a function of
the margin m = beta h it is (m - 1/2)^2 / beta^2, with l'(0) = -1 / beta^2; it grows where m is above 1/2, so that
Assumption 5.1 (never increasing) does not hold.

`ipo` sums log-probs over tokens, as the equation has them. `ipo_per_token` divides each log-ratio by its response's
tokens before it takes the difference: TRL's `ipo`, which its authors say is what the paper's results were made with.
"""

from spin_jax.objectives.spin import margin_objective


def _loss(margins_BP, settings):
    return (margins_BP / settings.beta - 1 / (2 * settings.beta)) ** 2


ipo = margin_objective(_loss)
ipo_per_token = margin_objective(_loss, normalised=True)
