"""What a model says of responses, without ever holding [batch, length, vocabulary]: log-probs, entropy, accuracy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spin_jax.data.batch import Batch, PackedRows
from spin_jax.models import Execution, ModelConfig, forward, unembed


class Scores(NamedTuple):
    """What a model's logits say of tokens, or sums of it over the tokens of responses; all f32 of one shape.

    Attributes:
        logps: log p(y_j | x, y_<j), in nats.
        entropy: of the distribution that y_j is drawn from, in nats; no gradient.
        correct: 1 where y_j is the most likely token, else 0; no gradient.
    """

    logps: jax.Array
    entropy: jax.Array
    correct: jax.Array


def pair_logprobs(config: ModelConfig, params: dict, batch: Batch, execution: Execution) -> jax.Array:
    """log p(y|x) = sum_j log p(y_j | x, y_<j) of the responses of each pair, in nats, f32 [B, P, Y]; the prompt is read
    once for all of them."""
    return pair_scores(config, params, batch, execution).logps


def pair_scores(config: ModelConfig, params: dict, batch: Batch, execution: Execution) -> Scores:
    """Sums over the tokens of each response, [B, P, Y]; 0 of none."""
    shape = batch.reference_logps_BPY.shape
    of_targets = target_scores(config, params, batch.rows, execution)
    # A sum and no matmul, whose operands a TPU would round.
    ids_Z = jnp.arange(shape[1] * shape[2], dtype=jnp.int32)
    own_BRZ = batch.rows.response_ids_BR[:, :, None] == ids_Z[None, None]
    sums = [jnp.sum(jnp.where(own_BRZ, x_BR[:, :, None], 0.0), axis=1).reshape(shape) for x_BR in of_targets]
    return Scores(*sums)


def target_scores(config: ModelConfig, params: dict, rows: PackedRows, execution: Execution) -> Scores:
    """Of each target of packed rows, [B, R].

    Only positions that predict a response token reach the vocabulary projection: they are gathered from the hidden
    states, and scored `execution.logits_chunk` at a time. Each chunk's logits are recomputed in the backward pass, so
    that memory holds one chunk of them; all at once are kept, as the backward pass begins with them.
    """
    hidden_BTD, _ = forward(
        config, params, rows.tokens_BT, rows.positions_BT, visible_until_BT=rows.visible_until_BT, execution=execution
    )
    hidden_BRD = jnp.take_along_axis(hidden_BTD, rows.predictor_index_BR[:, :, None], axis=1)
    return token_scores(config, params, hidden_BRD, rows.targets_BR, execution)


def token_scores(
    config: ModelConfig, params: dict, hidden_BRD: jax.Array, targets_BR: jax.Array, execution: Execution
) -> Scores:
    """Of log softmax(logits), f32 [B, R], `execution.logits_chunk` of the R positions at a time."""

    def score(hidden_BCD: jax.Array, targets_BC: jax.Array) -> Scores:
        with jax.named_scope("unembed"):
            logits_BCV = unembed(config, params, hidden_BCD, execution)
            chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
            total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
            frozen_BCV, frozen_BC = jax.lax.stop_gradient((logits_BCV, total_BC))
            mean_BC = jnp.sum(jnp.exp(frozen_BCV - frozen_BC[..., None]) * frozen_BCV, axis=-1)
            is_best_BC = jax.lax.stop_gradient(chosen_BC) >= jnp.max(frozen_BCV, axis=-1)
            return Scores(chosen_BC - total_BC, frozen_BC - mean_BC, is_best_BC.astype(jnp.float32))

    rows, length = targets_BR.shape
    size = min(execution.logits_chunk or length, length)
    if size == length:
        return score(hidden_BRD, targets_BR)

    def chunks(x_BR: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, -length % size)] + [(0, 0)] * (x_BR.ndim - 2)
        return jnp.pad(x_BR, padding).reshape(rows, -1, size, *x_BR.shape[2:]).swapaxes(0, 1)

    # A loop: written out, XLA on CPUs holds the weight's gradient once for each chunk.
    found = jax.lax.map(lambda chunk: jax.checkpoint(score)(*chunk), (chunks(hidden_BRD), chunks(targets_BR)))
    return Scores(*(x_XBC.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x_XBC in found))
