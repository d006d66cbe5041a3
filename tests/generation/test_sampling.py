"""How the next token is drawn: against softmax, against top-k and top-p by the book, and by its address."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spin_jax.config import GenerateConfig
from spin_jax.generation.sampling import (
    SamplingParams,
    keep_likely,
    next_tokens,
    response_keys,
    token_keys,
    token_logprobs,
)

SEED = 42


def sampling(**changes) -> SamplingParams:
    return SamplingParams.of(GenerateConfig(**changes), ())


def keys(rows: int) -> jax.Array:
    """The first token's key of the first response to each row."""
    rows_B = np.arange(rows, dtype=np.int32)
    return token_keys(response_keys(SEED, 0, rows_B, np.zeros_like(rows_B)), jnp.zeros(rows, jnp.int32))


# ---- addresses


def test_seed_iteration_row_number_and_token_each_give_another_key():
    """A sum of seed and iteration, of iteration and row, or of row and number would make some of these equal."""
    found = set()
    for seed, iteration, row, number in np.ndindex(3, 3, 3, 3):
        key = response_keys(seed, iteration, np.array([row], np.int32), np.array([number], np.int32))
        of_tokens = token_keys(np.repeat(key, 3, axis=0), jnp.arange(3))
        found |= {tuple(data) for data in jax.random.key_data(of_tokens).tolist()}
    assert len(found) == 3**5


# ---- the distribution


# Quantile 0.999 of chi-square by degrees of freedom.
CHI_SQUARE = {7: 24.32, 15: 37.70}


def chi_square(counts_V: np.ndarray, probabilities_V: np.ndarray) -> float:
    expected_V = probabilities_V * counts_V.sum()
    assert expected_V.min() > 5, "too few draws for the test"
    return float(np.sum((counts_V - expected_V) ** 2 / expected_V))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_softmax(temperature):
    logits_V = np.array([0.0, 1.0, -1.0, 0.5, 2.0, -0.5, 1.5, 0.2], np.float32)
    draws = 8192
    draw = jax.jit(next_tokens, static_argnums=3)
    tokens_B = draw(np.tile(logits_V, (draws, 1)), keys(draws), sampling(temperature=temperature), False)
    weights_V = np.exp(logits_V / temperature)
    counts_V = np.bincount(tokens_B, minlength=8)
    assert chi_square(counts_V, weights_V / weights_V.sum()) < CHI_SQUARE[7]
    flat_V = np.exp(logits_V / (1.5 * temperature))
    assert chi_square(counts_V, flat_V / flat_V.sum()) > 2 * CHI_SQUARE[7], "the test would show a wrong temperature"


# ---- top-k and top-p


def kept_by_the_book(logits_V: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Which tokens stay: the k best, of these the fewest that reach p, and whoever ties with the last of them."""
    order = sorted(range(len(logits_V)), key=lambda v: -logits_V[v])[: top_k or None]
    weights = np.exp(logits_V[order].astype(np.float64))
    needed, total = 0, 0.0
    while needed < len(order) and (needed == 0 or total < top_p * weights.sum() or top_p >= 1):
        total += weights[needed]
        needed += 1
    return logits_V >= logits_V[order[needed - 1]]


@pytest.mark.parametrize("decimals", [5, 0])  # 0: many ties
def test_keep_likely_is_top_k_then_top_p(decimals):
    logits_BV = np.random.default_rng(0).normal(size=(20, 40), scale=2).round(decimals).astype(np.float32)
    keep = jax.jit(keep_likely)
    for top_p, top_k in ((1.0, 0), (0.9, 0), (0.31, 0), (1.0, 5), (0.77, 5), (0.5, 1), (1e-6, 0), (0.99, 1000)):
        cut_BV = np.asarray(keep(logits_BV, top_p, top_k))
        kept_BV = np.stack([kept_by_the_book(logits_V, top_p, top_k) for logits_V in logits_BV])
        np.testing.assert_array_equal(cut_BV, np.where(kept_BV, logits_BV, -np.inf), err_msg=f"{top_p} {top_k}")


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-4}, {"temperature": 0.0}])
def test_the_narrowest_cuts_are_greedy(how):
    logits_BV = np.random.default_rng(1).normal(size=(64, 40)).astype(np.float32)
    np.testing.assert_array_equal(next_tokens(logits_BV, keys(64), sampling(**how), True), logits_BV.argmax(axis=-1))
    assert not np.array_equal(next_tokens(logits_BV, keys(64), sampling(), True), logits_BV.argmax(axis=-1))


def test_cuts_that_cut_nothing_change_nothing():
    logits_BV = np.random.default_rng(1).normal(size=(64, 40)).astype(np.float32)
    whole, cut = (next_tokens(logits_BV, keys(64), sampling(), filtered) for filtered in (False, True))
    np.testing.assert_array_equal(whole, cut)


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [3]), (2, [2, 3]), (3, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4]), (7, list(range(7)))]
)
def test_cuts_take_any_logits(top_k, kept):
    """Both zeros, which tie, the largest numbers, and tokens that are forbidden already."""
    logits_V = np.array([0.0, -0.0, 1e-30, 3e38, -1e-30, -3e38, -np.inf], np.float32)
    kept_V = np.asarray(keep_likely(logits_V[None], 1.0, top_k)[0] == logits_V)
    np.testing.assert_array_equal(np.flatnonzero(kept_V | (logits_V == -np.inf)), sorted({*kept, 6}))


def test_logprobs_are_those_of_softmax():
    logits_BV = np.random.default_rng(2).normal(size=(5, 40), scale=9).astype(np.float32)
    tokens_B = np.array([0, 39, 7, 7, 12])
    exact_BV = logits_BV - np.log(np.exp(logits_BV.astype(np.float64)).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(token_logprobs(logits_BV, tokens_B), exact_BV[np.arange(5), tokens_B], atol=1e-5)
