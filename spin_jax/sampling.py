"""The jitted sampling loop: y' ~ p_t(.|x) with a key/value cache.

Randomness has an address: token j of the response to row i at iteration t is drawn with a key made of (seed, t, i, j)
and of nothing else. Rows never see each other: the slots of a row's cache that are filled, and what it sees of them,
follow from its prompt's own length, so that where it stands in a batch leaves no trace in it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spin_jax.models import NOWHERE, Compute, ModelConfig, forward, init_cache, unembed


class Decoding(NamedTuple):
    """How the next token is chosen. All three are traced: changing one compiles nothing anew.

    Attributes:
        temperature: f32 scalar; 0 is greedy.
        top_p: f32 scalar in (0, 1]; the smallest set of tokens whose probability reaches it; 1 is off.
        top_k: int32 scalar; this many most likely tokens; 0 is off.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array


class Responses(NamedTuple):
    """Sampled responses.

    Attributes:
        tokens_BR: int32; a response, then zeros. A stop token, where one was drawn, is its last token.
        lengths_B: int32, tokens of the response.
        finished_B: bool; False where the response was cut at the cap.
    """

    tokens_BR: jax.Array
    lengths_B: jax.Array
    finished_B: jax.Array


def row_keys(seed: int, iteration: int, rows_B: jax.Array) -> jax.Array:
    """The random keys [B] of rows (their numbers in the data set, int32) at an iteration."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), iteration)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)


def sample(
    config: ModelConfig,
    params: dict,
    prompts_BP: jax.Array,
    prompt_lengths_B: jax.Array,
    keys_B: jax.Array,
    decoding: Decoding,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    truncate: bool,
    compute: Compute,
) -> Responses:
    """Draw one response a row. Pure; jit it with config, max_new_tokens, stop_ids, truncate and compute static.

    Args:
        config: the model's.
        params: the opponent's; store them in the compute dtype, since every decode step reads them all.
        prompts_BP: int32, right-padded.
        prompt_lengths_B: int32, at least 1; a row of length 0 is a filler, and finished from the start.
        keys_B: from `row_keys`.
        decoding: temperature, top-p, top-k.
        max_new_tokens: R, the cap of a response in tokens.
        stop_ids: a response ends with the first of these.
        truncate: whether top-p and top-k are looked at; they cost a sort of the vocabulary every step.
        compute: its dtype is also the cache's; its mesh that of `sharding.decode_mesh`.
    """
    batch, prompt_slots = prompts_BP.shape
    cache = init_cache(config, batch, prompt_slots + max_new_tokens, compute)
    slots_1P = jnp.arange(prompt_slots, dtype=jnp.int32)[None]
    positions_BP = jnp.where(slots_1P < prompt_lengths_B[:, None], slots_1P, NOWHERE)
    hidden_BTD, cache = forward(config, params, prompts_BP, positions_BP, cache, compute=compute)
    last_B = jnp.maximum(prompt_lengths_B - 1, 0)
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    responses = Responses(
        tokens_BR=jnp.zeros((batch, max_new_tokens), jnp.int32),
        lengths_B=jnp.zeros((batch,), jnp.int32),
        finished_B=prompt_lengths_B == 0,
    )

    def unfinished(carry) -> jax.Array:
        step, _, responses, _ = carry
        return (step < max_new_tokens) & ~jnp.all(responses.finished_B)

    def decode(carry):
        step, hidden_BD, responses, cache = carry
        logits_BV = unembed(config, params, hidden_BD, compute)
        token_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, step)
        tokens_B = next_tokens(logits_BV, token_keys_B, decoding, truncate)
        running_B = ~responses.finished_B
        responses = Responses(
            tokens_BR=responses.tokens_BR.at[:, step].set(jnp.where(running_B, tokens_B, 0)),
            lengths_B=responses.lengths_B + running_B,
            finished_B=responses.finished_B | jnp.isin(tokens_B, jnp.array(stop_ids, jnp.int32)),
        )
        positions_B1 = (prompt_lengths_B + step)[:, None]
        hidden_B1D, cache = forward(config, params, tokens_B[:, None], positions_B1, cache, compute=compute)
        return step + 1, hidden_B1D[:, 0], responses, cache

    _, _, responses, _ = jax.lax.while_loop(unfinished, decode, (jnp.int32(0), hidden_BD, responses, cache))
    return responses


def next_tokens(logits_BV: jax.Array, keys_B: jax.Array, decoding: Decoding, truncate: bool) -> jax.Array:
    """One token a row, int32 [B]: argmax at temperature 0, else a draw from softmax(logits / temperature), cut by
    top-k and then top-p."""
    scaled_BV = logits_BV / jnp.where(decoding.temperature > 0, decoding.temperature, 1.0)
    if truncate:
        scaled_BV = keep_likely(scaled_BV, decoding.top_p, decoding.top_k)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BV)
    return jnp.where(decoding.temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def keep_likely(logits_BV: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Set logits outside the top_k most likely, and then outside the smallest set of probability >= top_p, to -inf.

    The most likely token always stays. Tokens that tie with the last one kept stay too, so that the result does not
    depend on a sort's order.
    """
    vocabulary = logits_BV.shape[-1]
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    in_top_k_V = jnp.arange(vocabulary) < jnp.where(top_k > 0, top_k, vocabulary)
    probabilities_BV = jax.nn.softmax(jnp.where(in_top_k_V[None, :], descending_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    kept_B = jnp.sum(in_top_k_V[None, :] & ((before_BV < top_p) | (top_p >= 1)), axis=-1)
    threshold_B1 = jnp.take_along_axis(descending_BV, jnp.maximum(kept_B - 1, 0)[:, None], axis=-1)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
