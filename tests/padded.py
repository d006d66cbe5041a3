"""The computation that packing replaces, by the book: each response in a row of its own behind a copy of its prompt,
all logits of all positions, their log_softmax, and the sum over each response."""

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax.data.pairs import Pair
from spin_jax.models import Execution, ModelConfig, forward, unembed


def pair_logprobs(config: ModelConfig, params: dict, pairs: list[Pair], execution: Execution) -> jax.Array:
    """log p(y|x) of the responses of each pair, f32 [pairs, Y]."""
    return pair_scores(config, params, pairs, execution)[0]


def pair_scores(config: ModelConfig, params: dict, pairs: list[Pair], execution: Execution) -> list[jax.Array]:
    """Log-probs of the responses of each pair, their tokens' entropies, and how many tokens are the most likely ones:
    f32 [pairs, Y] each."""
    rows = [(len(pair.prompt), np.concatenate([pair.prompt, y])) for pair in pairs for y in pair.responses]
    length = -(-max(len(row) for _, row in rows) // 16) * 16
    tokens_NT = np.array([np.pad(row, (0, length - len(row))) for _, row in rows])
    logps_NTV = jax.nn.log_softmax(
        unembed(config, params, forward(config, params, tokens_NT, execution=execution)[0], execution)
    )
    chosen_NT = jnp.take_along_axis(logps_NTV[:, :-1], tokens_NT[:, 1:, None], axis=2)[..., 0]
    of_response_NT = np.array([[prompt - 1 <= t < len(row) - 1 for t in range(length - 1)] for prompt, row in rows])
    entropy_NT = -jnp.sum(jnp.exp(logps_NTV) * logps_NTV, axis=-1)[:, :-1]
    correct_NT = jnp.argmax(logps_NTV[:, :-1], axis=-1) == tokens_NT[:, 1:]
    found = (jnp.where(of_response_NT, x_NT, 0.0) for x_NT in (chosen_NT, entropy_NT, correct_NT))
    return [jnp.sum(x_NT, axis=1).reshape(len(pairs), -1) for x_NT in found]
