"""What a model costs: its parameters, and the FLOPs of a token."""

import functools
import math

import jax

from spin_jax.models.config import ModelConfig
from spin_jax.models.weights import stacked_weights


def num_params(config: ModelConfig) -> int:
    """How many numbers the params hold; tied embeddings count once."""
    return sum(math.prod(weight.shape) for weight in jax.tree.leaves(stacked_weights(config)))


def flops_per_token(config: ModelConfig, context: float) -> float:
    """Matmul FLOPs (2 per multiply-add) of one token's forward pass, without the vocabulary projection.

    Args:
        context: keys that the token attends to, on average: (T + 1) / 2 in a causal row of T, less under a window.
    """
    scores_and_values = config.num_layers * 2 * config.num_heads * config.head_dim * context
    return 2.0 * (_projected_numbers(config) + scores_and_values)


@functools.cache  # asked for each pair of a run
def _projected_numbers(config: ModelConfig) -> int:
    """How many numbers the matrices of all layers have."""
    of_layers = jax.tree.leaves(stacked_weights(config)["layers"])
    return sum(math.prod(weight.shape) for weight in of_layers if weight.inputs)


def unembed_flops(config: ModelConfig) -> float:
    """Matmul FLOPs (2 per multiply-add) of `unembed` for one position."""
    return 2.0 * config.hidden_size * config.vocab_size
