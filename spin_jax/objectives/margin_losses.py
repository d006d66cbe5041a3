"""The loss functions l of SPIN (arXiv 2401.01335, equation 4.2), as plain functions of the margin.

The margin of a pair is what equation 4.7 puts inside l:

    margin = beta * [ log p_theta(y|x) / p_t(y|x)  -  log p_theta(y'|x) / p_t(y'|x) ]

with y the real response, y' the generated one, p_t the opponent and beta the paper's lambda. Every loss here satisfies
the paper's Assumption 5.1: convex, non-increasing, l'(0) < 0.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T", jax.Array, np.ndarray)


def logistic(margin: jax.Array) -> jax.Array:
    """l(t) = log(1 + exp(-t)); the paper's choice (section 4.1). l(0) = log 2, l'(0) = -1/2."""
    return jax.nn.softplus(-margin)


def hinge(margin: jax.Array) -> jax.Array:
    """l(t) = max(0, 1 - t) (Assumption 5.1). No gradient once the margin passes 1. l(0) = 1, l'(0) = -1."""
    return jax.nn.relu(1.0 - margin)


def exponential(margin: jax.Array) -> jax.Array:
    """l(t) = exp(-t) (Assumption 5.1). Unbounded slope on lost pairs: wants a small beta. l(0) = 1, l'(0) = -1."""
    return jnp.exp(-margin)


def correlation(margin: jax.Array) -> jax.Array:
    """l(t) = 1 - t (Assumption 5.1); the integral probability metric of equation 4.1. Unbounded below. l(0) = 1, l'(0)
    = -1."""
    return 1.0 - margin


def rewards(policy_logps: T, opponent_logps: T, beta: float) -> T:
    """The reward of a response, beta * log p_theta(y|x) / p_t(y|x) (equation 4.6). Shapes broadcast; log-probs are
    sums over tokens, in nats."""
    return beta * (policy_logps - opponent_logps)
