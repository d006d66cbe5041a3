"""Summed log-probs of responses under a model, without ever holding [batch, length, vocabulary]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spin_jax.models import Compute, ModelConfig, forward, unembed


class Rows(NamedTuple):
    """Rows of pairs, one after the other, each `prompt | response | response`, then padding.

    What a token may see, and who predicts what, travels with the tokens; nothing is inferred from ids. The last token
    of a response predicts nothing and is a target only. The last token of a prompt predicts the first of each response.

    Attributes:
        tokens_BT: int32.
        positions_BT: int32, places of the tokens in their own sequence: both responses go on where the prompt ends.
        ends_BT: int32, the first slot of the row whose token, and all after it, does not see this one: the end of the
            pair, and for the first of two responses its own end.
        sources_BR: int32, slots of the tokens that predict the targets.
        targets_BR: int32, the tokens of the responses, a stop id only where a response really ended.
        owners_BR: int32, which of its row's responses a target belongs to; -1 is padding.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    ends_BT: jax.Array
    sources_BR: jax.Array
    targets_BR: jax.Array
    owners_BR: jax.Array


def response_logprobs(config: ModelConfig, params: dict, rows: Rows, responses: int, compute: Compute) -> jax.Array:
    """log p(y|x) = sum_j log p(y_j | x, y_<j) of each row's responses, in nats, f32 [B, responses]; 0 of none.

    Only positions that predict a response token reach the vocabulary projection: they are gathered from the hidden
    states, and scored `compute.logits_chunk` at a time. Each chunk's logits are recomputed in the backward pass, so
    that memory holds one chunk of them; all at once are kept, as the backward pass begins with them.
    """
    hidden_BTD, _ = forward(config, params, rows.tokens_BT, rows.positions_BT, ends_BT=rows.ends_BT, compute=compute)
    hidden_BRD = jnp.take_along_axis(hidden_BTD, rows.sources_BR[:, :, None], axis=1)
    logps_BR = token_logprobs(config, params, hidden_BRD, rows.targets_BR, compute)
    # A sum and no matmul, whose operands a TPU would round.
    own_BRY = rows.owners_BR[:, :, None] == jnp.arange(responses, dtype=jnp.int32)[None, None]
    return jnp.sum(jnp.where(own_BRY, logps_BR[:, :, None], 0.0), axis=1)


def token_logprobs(
    config: ModelConfig, params: dict, hidden_BRD: jax.Array, targets_BR: jax.Array, compute: Compute
) -> jax.Array:
    """log softmax(logits)[target] in f32 [B, R], `compute.logits_chunk` of the R positions at a time."""

    def score(hidden_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        with jax.named_scope("unembed"):
            logits_BCV = unembed(config, params, hidden_BCD, compute)
            chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
            return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    rows, length = targets_BR.shape
    size = min(compute.logits_chunk or length, length)
    if size == length:
        return score(hidden_BRD, targets_BR)

    def chunks(x_BR: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, -length % size)] + [(0, 0)] * (x_BR.ndim - 2)
        return jnp.pad(x_BR, padding).reshape(rows, -1, size, *x_BR.shape[2:]).swapaxes(0, 1)

    # A loop: written out, XLA on CPUs holds the weight's gradient once for each chunk.
    logps_XBC = jax.lax.map(lambda chunk: jax.checkpoint(score)(*chunk), (chunks(hidden_BRD), chunks(targets_BR)))
    return logps_XBC.swapaxes(0, 1).reshape(rows, -1)[:, :length]
