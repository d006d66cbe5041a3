"""Label smoothing (conservative DPO): a share e of the pairs is taken to be the wrong way round.

    L = (1 - e) log(1 + exp(-m)) + e log(1 + exp(m)),   m the margin of equation 4.7, e `config.spin.label_smoothing`

Source: E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023),
https://ericmitchell.ai/cdpo.pdf. l(0) = log 2, l'(0) = -(1 - 2 e) / 2. The loss grows again where m is above log((1 -
e) / e): margins are bounded, and Assumption 5.1 (never increasing) does not hold.
"""

from spin_jax.objectives.margin_losses import logistic
from spin_jax.objectives.spin import margin_objective


def _loss(margins_BP, settings):
    e = settings.label_smoothing
    return (1 - e) * logistic(margins_BP) + e * logistic(-margins_BP)


cdpo = margin_objective(_loss, reads=("label_smoothing",))
