"""What a model costs: its parameters, and the FLOPs of a token."""

import math

import jax

from spin_jax.models.config import ModelConfig
from spin_jax.models.params import abstract_params


def num_params(config: ModelConfig) -> int:
    """How many numbers the params hold; tied embeddings count once."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(config)))


def flops_per_token(config: ModelConfig, context: float) -> float:
    """Matmul FLOPs (2 per multiply-add) of one token's forward pass, without the vocabulary projection.

    Args:
        context: keys that the token attends to, on average: (T + 1) / 2 in a causal row of T, less under a window.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o, k and v
    projections = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    scores_and_values = 2 * config.num_heads * config.head_dim * context
    return 2.0 * config.num_layers * (projections + scores_and_values)


def unembed_flops(config: ModelConfig) -> float:
    """Matmul FLOPs (2 per multiply-add) of `unembed` for one position."""
    return 2.0 * config.hidden_size * config.vocab_size
