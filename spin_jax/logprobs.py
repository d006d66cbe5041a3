"""Summed log-probs of responses under a model, without ever holding [batch, length, vocabulary]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spin_jax.models import Compute, ModelConfig, forward, unembed


class Rows(NamedTuple):
    """Right-padded rows: a prompt, its response, then padding. Lengths travel with the tokens; nothing is inferred
    from ids.

    Attributes:
        tokens_BT: int32, prompt and response.
        prompt_lengths_B: int32, tokens of the prompt, at least 1.
        responses_BR: int32, the response again, alone. These are the targets, a stop id only where the response really
            ended.
        response_lengths_B: int32, tokens of the response.
    """

    tokens_BT: jax.Array
    prompt_lengths_B: jax.Array
    responses_BR: jax.Array
    response_lengths_B: jax.Array


def response_logprobs(config: ModelConfig, params: dict, rows: Rows, compute: Compute) -> jax.Array:
    """log p(y|x) = sum_j log p(y_j | x, y_<j) of each row, in nats, f32 [B].

    Only positions that predict a response token reach the vocabulary projection: they are gathered from the hidden
    states, and scored `compute.logits_chunk` at a time. Each chunk's logits are recomputed in the backward pass, so
    that memory holds one chunk of them.
    """
    hidden_BTD, _ = forward(config, params, rows.tokens_BT, compute=compute)
    offsets_1R = jnp.arange(rows.responses_BR.shape[1], dtype=jnp.int32)[None, :]
    # Position p predicts token p + 1: the last token of the prompt predicts the first of the response.
    positions_BR = jnp.minimum(rows.prompt_lengths_B[:, None] - 1 + offsets_1R, rows.tokens_BT.shape[1] - 1)
    hidden_BRD = jnp.take_along_axis(hidden_BTD, positions_BR[:, :, None], axis=1)
    logps_BR = token_logprobs(config, params, hidden_BRD, rows.responses_BR, compute)
    return jnp.sum(logps_BR, axis=1, where=offsets_1R < rows.response_lengths_B[:, None])


def token_logprobs(
    config: ModelConfig, params: dict, hidden_BRD: jax.Array, targets_BR: jax.Array, compute: Compute
) -> jax.Array:
    """log softmax(logits)[target] in f32 [B, R], `compute.logits_chunk` of the R positions at a time."""

    @jax.checkpoint
    def score(hidden_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        with jax.named_scope("unembed"):
            logits_BCV = unembed(config, params, hidden_BCD, compute)
            chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
            return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    length = hidden_BRD.shape[1]
    step = compute.logits_chunk or length
    pieces = [score(hidden_BRD[:, i : i + step], targets_BR[:, i : i + step]) for i in range(0, length, step)]
    return jnp.concatenate(pieces, axis=1)
