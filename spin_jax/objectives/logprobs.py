"""Summed log-probs of responses under a model, without ever holding [batch, length, vocabulary]."""

import jax
import jax.numpy as jnp

from spin_jax.data.batch import Batch, PackedRows
from spin_jax.models import Execution, ModelConfig, forward, unembed


def response_logprobs(
    config: ModelConfig, params: dict, rows: PackedRows, responses: int, execution: Execution
) -> jax.Array:
    """log p(y|x) = sum_j log p(y_j | x, y_<j) of each row's Z responses, in nats, f32 [B, Z]; 0 of none."""
    logps_BR = target_logprobs(config, params, rows, execution)
    # A sum and no matmul, whose operands a TPU would round.
    own_BRZ = rows.response_ids_BR[:, :, None] == jnp.arange(responses, dtype=jnp.int32)[None, None]
    return jnp.sum(jnp.where(own_BRZ, logps_BR[:, :, None], 0.0), axis=1)


def target_logprobs(config: ModelConfig, params: dict, rows: PackedRows, execution: Execution) -> jax.Array:
    """log p(y_j | x, y_<j) of each target of packed rows, in nats, f32 [B, R].

    Only positions that predict a response token reach the vocabulary projection: they are gathered from the hidden
    states, and scored `execution.logits_chunk` at a time. Each chunk's logits are recomputed in the backward pass, so
    that memory holds one chunk of them; all at once are kept, as the backward pass begins with them.
    """
    hidden_BTD, _ = forward(
        config, params, rows.tokens_BT, rows.positions_BT, visible_until_BT=rows.visible_until_BT, execution=execution
    )
    hidden_BRD = jnp.take_along_axis(hidden_BTD, rows.predictor_index_BR[:, :, None], axis=1)
    return token_logprobs(config, params, hidden_BRD, rows.targets_BR, execution)


def token_logprobs(
    config: ModelConfig, params: dict, hidden_BRD: jax.Array, targets_BR: jax.Array, execution: Execution
) -> jax.Array:
    """log softmax(logits)[target] in f32 [B, R], `execution.logits_chunk` of the R positions at a time."""

    def score(hidden_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        with jax.named_scope("unembed"):
            logits_BCV = unembed(config, params, hidden_BCD, execution)
            chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
            return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    rows, length = targets_BR.shape
    size = min(execution.logits_chunk or length, length)
    if size == length:
        return score(hidden_BRD, targets_BR)

    def chunks(x_BR: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, -length % size)] + [(0, 0)] * (x_BR.ndim - 2)
        return jnp.pad(x_BR, padding).reshape(rows, -1, size, *x_BR.shape[2:]).swapaxes(0, 1)

    # A loop: written out, XLA on CPUs holds the weight's gradient once for each chunk.
    logps_XBC = jax.lax.map(lambda chunk: jax.checkpoint(score)(*chunk), (chunks(hidden_BRD), chunks(targets_BR)))
    return logps_XBC.swapaxes(0, 1).reshape(rows, -1)[:, :length]


def pair_logprobs(config: ModelConfig, params: dict, batch: Batch, execution: Execution) -> jax.Array:
    """log p(y|x) of the responses of each pair, in nats, f32 [B, P, Y]; the prompt is read once for all of them."""
    shape = batch.reference_logps_BPY.shape
    return response_logprobs(config, params, batch.rows, shape[1] * shape[2], execution).reshape(shape)
