"""Draw the next token: y_j ~ p_t(.|x, y_<j), with temperature, top-p, top-k and a least length.

Randomness has an address: token j of response n to row i at iteration t is drawn with a key made of (seed, t, i, n, j)
and of nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax.config import GenerateConfig

# A key is folded with 32 bits for a response: so many for the row, and the rest for the response's number.
_ROW_BITS = 24
MAX_ROWS, MAX_RESPONSES = 2**_ROW_BITS, 2 ** (31 - _ROW_BITS)


class SamplingParams(NamedTuple):
    """How the next token is chosen. All values are traced, so that changing one compiles nothing.

    Attributes:
        temperature: f32 scalar; 0 is greedy.
        top_p: f32 scalar in (0, 1]: draw from the smallest set of tokens whose probability reaches it. 1 is off.
        top_k: int32 scalar: draw from so many most likely tokens. 0 is off.
        min_new_tokens: int32 scalar: draw no stop id before a response has so many tokens.
        stop_ids: int32 [n], of which the first ends a response; padded with a number that is no token's id.
        stops_AV: int32 [A, V], from `stop_strings.stop_table`: the token that completes a stop string ends a response.
            None without stop strings.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_new_tokens: jax.Array
    stop_ids: jax.Array
    stops_AV: jax.Array | None

    @classmethod
    def of(
        cls, settings: GenerateConfig, stop_ids: Sequence[int], stops_AV: np.ndarray | None = None
    ) -> "SamplingParams":
        """Make them from `config.generate`."""
        # Pad to a multiple of 8: another number of stop ids is then seldom another shape, which is another program.
        padded = np.full(-(-max(len(stop_ids), 1) // 8) * 8, np.iinfo(np.int32).max, np.int32)
        padded[: len(stop_ids)] = stop_ids
        numbers: list[Any] = [np.float32(settings.temperature), np.float32(settings.top_p)]
        numbers += [np.int32(settings.top_k), np.int32(settings.min_new_tokens), padded, stops_AV]
        return cls(*numbers)


def response_keys(seed: int, iteration: int, rows_B: np.ndarray, numbers_B: np.ndarray) -> np.ndarray:
    """Return the random keys of responses, as data: uint32 [B, 2].

    Args:
        rows_B: indices of the prompts, below MAX_ROWS.
        numbers_B: which of a prompt's responses, below MAX_RESPONSES.
    """
    return np.asarray(_response_keys(seed, iteration, rows_B + (numbers_B << _ROW_BITS)))


@jax.jit
def _response_keys(seed: jax.Array, iteration: jax.Array, addresses_B: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), iteration)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, addresses_B))


def token_keys(keys_B2: jax.Array, steps_B: jax.Array) -> jax.Array:
    """Return the keys [B] of each response's token number `steps_B` (0, 1, ...)."""
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_B2, impl="threefry2x32"), steps_B)


def next_tokens(logits_BV: jax.Array, keys_B: jax.Array, sampling: SamplingParams, filtered: bool) -> jax.Array:
    """Choose a token for each row, int32 [B]: argmax at temperature 0, else a draw from softmax(logits / temperature).
    If `filtered`, apply top-k and then top-p first."""

    def draw(logits_BV: jax.Array) -> jax.Array:
        scaled_BV = logits_BV / sampling.temperature
        if filtered:
            scaled_BV = keep_likely(scaled_BV, sampling.top_p, sampling.top_k)
        # The argmax of logits plus Gumbel noise is a draw from their softmax.
        return _first_greatest(scaled_BV + jax.vmap(lambda key: jax.random.gumbel(key, scaled_BV.shape[1:]))(keys_B))

    # XLA puts the false branch first, and the compile check counts the first branch: let that be the draw.
    return jax.lax.cond(sampling.temperature == 0, _first_greatest, draw, logits_BV)


def _first_greatest(x_BV: jax.Array) -> jax.Array:
    """argmax along V, int32 [B], as two reductions of one number each: XLA makes faster loops of them on CPUs."""
    indices_BV = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    last = x_BV.shape[1] - 1
    return jnp.min(jnp.where(x_BV == jnp.max(x_BV, axis=1, keepdims=True), indices_BV, last), axis=1)


def token_logprobs(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """Return log p(token), f32 [B], under the model itself: at temperature 1, without filters."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def keep_likely(logits_BV: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Set logits to -inf outside the top_k most likely tokens, then outside the smallest set of probability >= top_p.

    The most likely token always stays, and so do tokens that tie with the last one kept. Nothing is sorted: each
    threshold is the greatest number which enough tokens, or enough probability, reach, and is found bit by bit.
    """
    order_BV = _order(logits_BV)
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    count = jnp.where(top_k > 0, jnp.minimum(top_k, logits_BV.shape[-1]), logits_BV.shape[-1])

    def mass(chosen_BV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen_BV, weights_BV, 0.0), axis=-1)

    kth_B = _greatest(lambda least_B: jnp.sum(order_BV >= least_B[:, None], axis=-1) >= count, len(logits_BV))
    above_BV = order_BV > kth_B[:, None]
    # Several tokens may tie for the last of the k places: count only as many as there are places.
    kth_weight_B = jnp.max(jnp.where(above_BV, 0.0, weights_BV), axis=-1)
    total_B = mass(above_BV) + (count - jnp.sum(above_BV, axis=-1)) * kth_weight_B
    enough_B = jnp.where(top_p < 1, top_p * total_B, 0.0)
    nucleus_B = _greatest(lambda least_B: mass(order_BV >= least_B[:, None]) >= enough_B, len(logits_BV))
    least_B = jnp.where(top_p < 1, jnp.maximum(kth_B, nucleus_B), kth_B)
    return jnp.where(order_BV >= least_B[:, None], logits_BV, -jnp.inf)


def _order(x: jax.Array) -> jax.Array:
    """Map f32 numbers to uint32 numbers with the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0 is 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _greatest(holds: Callable[[jax.Array], jax.Array], batch: int) -> jax.Array:
    """Find the greatest uint32 [B] for which a condition holds. It must hold for 0, and for all numbers below one for
    which it holds."""

    def with_bit(i: jax.Array, found_B: jax.Array) -> jax.Array:
        candidate_B = found_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(candidate_B), candidate_B, found_B)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(batch, jnp.uint32))
