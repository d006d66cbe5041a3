"""Supervised fine-tuning on the opponent's own responses: simple self-distillation (arXiv 2604.01193).

    L = the mean over response tokens of -log p_theta(y'_j | x, y'_<j),   y' ~ p_t

The control that tells self-play from self-training: the same responses, and nothing to tell them from. With y' drawn
from p_t at temperature 1 and nothing filtered, its expected gradient at the start is 0; what it learns comes from
`config.generate.temperature`, `top_p` and `top_k`.
"""

from spin_jax.objectives.interface import Objective
from spin_jax.objectives.sft import negative_log_likelihood

ssd = Objective(negative_log_likelihood, ("generated",), reference=False, mean_over="tokens")
