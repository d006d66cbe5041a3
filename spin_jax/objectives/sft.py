"""Supervised fine-tuning: the mean over response tokens of -log p(y_j | x, y_<j)."""

from spin_jax.objectives.interface import Objective, Settings


def _of_pairs(policy_BPY, reference_BPY, lengths_BPY, settings: Settings):
    del reference_BPY, lengths_BPY, settings
    return -policy_BPY[..., 0], {}


sft = Objective(_of_pairs, ("real",), reference=False, mean_over="tokens")
