"""Supervised fine-tuning: the mean over response tokens of -log p(y_j | x, y_<j)."""

from spin_jax.objectives.interface import Objective, Settings


def negative_log_likelihood(policy_BPY, reference_BPY, lengths_BPY, settings: Settings):
    """-log p(y|x) of the one response, in nats."""
    del reference_BPY, lengths_BPY, settings
    return -policy_BPY[..., 0], {}


sft = Objective(negative_log_likelihood, ("real",), reference=False, mean_over="tokens")
