"""Summed log-probs of responses: against log_softmax over all logits, and against themselves by other routes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spin_jax.logprobs import Rows, response_logprobs
from spin_jax.models import REMAT_POLICIES, Compute, forward, unembed

# (prompt, response) tokens: short beside long, a row without padding, a response of one token, one of none.
LENGTHS = ((1, 6), (10, 6), (3, 1), (7, 4), (5, 0))
PLAIN = Compute(remat="none")


def make_rows(extra_T: int = 0, extra_R: int = 0, pad_seed: int | None = None) -> Rows:
    """LENGTHS as rows of 16 + extra_T and 6 + extra_R slots; the padding is id 0, or random ids."""
    rng = np.random.default_rng(1)
    pad = np.random.default_rng(pad_seed)
    tokens_BT, responses_BR = np.zeros((len(LENGTHS), 16 + extra_T), int), np.zeros((len(LENGTHS), 6 + extra_R), int)
    if pad_seed is not None:
        tokens_BT = pad.integers(0, tiny.CONFIG.vocab_size, tokens_BT.shape)
        responses_BR = pad.integers(0, tiny.CONFIG.vocab_size, responses_BR.shape)
    for i, (prompt, response) in enumerate(LENGTHS):
        tokens_BT[i, : prompt + response] = tiny.tokens(rng, prompt + response)
        responses_BR[i, :response] = tokens_BT[i, prompt : prompt + response]
    prompt_lengths_B, response_lengths_B = np.array(LENGTHS, np.int32).T
    return Rows(tokens_BT.astype(np.int32), prompt_lengths_B, responses_BR.astype(np.int32), response_lengths_B)


@functools.partial(jax.jit, static_argnums=2)
def logprobs(params: dict, rows: Rows, compute: Compute) -> jax.Array:
    return response_logprobs(tiny.CONFIG, params, rows, compute)


@functools.partial(jax.jit, static_argnums=2)
def gradient(params: dict, rows: Rows, compute: Compute) -> dict:
    """Of a weighted sum, so that no row's gradient can stand in for another's."""
    weights_B = jnp.arange(1.0, len(LENGTHS) + 1)
    return jax.grad(lambda params: jnp.sum(weights_B * response_logprobs(tiny.CONFIG, params, rows, compute)))(params)


def plain_logprobs(params: dict, rows: Rows) -> jax.Array:
    """By the book: all logits of all positions, their log_softmax, and the sum over each response, slice by slice."""
    logits_BTV = unembed(tiny.CONFIG, params, forward(tiny.CONFIG, params, rows.tokens_BT)[0])
    logps_BTV = jax.nn.log_softmax(logits_BTV)
    sums = []
    for i, (prompt, response) in enumerate(LENGTHS):
        targets_R = rows.tokens_BT[i, prompt : prompt + response]
        sums.append(jnp.sum(logps_BTV[i, jnp.arange(prompt - 1, prompt + response - 1), targets_R]))
    return jnp.stack(sums)


def assert_trees_close(actual: dict, expected: dict, share: float) -> None:
    """Every leaf within `share` of the expected leaf's largest element."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        name = jax.tree_util.keystr(path)
        other = functools.reduce(lambda tree, key: tree[key.key], path, actual)
        largest = np.max(np.abs(leaf))
        assert largest > 0, f"{name}: no gradient to compare"
        np.testing.assert_allclose(other, leaf, rtol=0, atol=share * largest, err_msg=name)


def test_equals_log_softmax_over_all_logits():
    rows = make_rows()
    expected_B = jax.jit(lambda params: plain_logprobs(params, rows))(tiny.params())
    assert len(np.unique(expected_B)) == len(LENGTHS)
    np.testing.assert_allclose(logprobs(tiny.params(), rows, PLAIN), expected_B, rtol=2e-6)


def test_gradient_equals_that_of_all_logits():
    rows = make_rows()
    weights_B = jnp.arange(1.0, len(LENGTHS) + 1)
    plain = jax.jit(jax.grad(lambda params: jnp.sum(weights_B * plain_logprobs(params, rows))))
    assert_trees_close(gradient(tiny.params(), rows, PLAIN), plain(tiny.params()), 5e-6)


def test_ids_in_the_padding_change_no_bit():
    zeros_B = logprobs(tiny.params(), make_rows(), PLAIN)
    assert zeros_B[-1] == 0, "an empty response has log-prob 0"
    for seed in range(3):
        np.testing.assert_array_equal(logprobs(tiny.params(), make_rows(pad_seed=seed), PLAIN), zeros_B)
    assert_trees_close(
        gradient(tiny.params(), make_rows(pad_seed=0), PLAIN), gradient(tiny.params(), make_rows(), PLAIN), 1e-6
    )


def test_the_amount_of_padding_does_not_matter():
    padded_B = logprobs(tiny.params(), make_rows(extra_T=16, extra_R=5), PLAIN)
    np.testing.assert_allclose(padded_B, logprobs(tiny.params(), make_rows(), PLAIN), rtol=2e-6)


@pytest.mark.parametrize("chunk", [2, 4, 100])
def test_chunks_of_any_size_give_the_same_values_and_gradients(chunk):
    rows, chunked = make_rows(), Compute(remat="none", logits_chunk=chunk)
    np.testing.assert_allclose(logprobs(tiny.params(), rows, chunked), logprobs(tiny.params(), rows, PLAIN), rtol=2e-6)
    assert_trees_close(gradient(tiny.params(), rows, chunked), gradient(tiny.params(), rows, PLAIN), 5e-6)


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES.keys() - {"none"}))
def test_remat_policies_give_the_same_gradients(remat):
    rows = make_rows()
    assert_trees_close(gradient(tiny.params(), rows, Compute(remat=remat)), gradient(tiny.params(), rows, PLAIN), 5e-6)


def test_no_more_than_a_chunk_of_logits_is_ever_held():
    """Forward and backward pass: every array with a vocabulary axis has at most `chunk` positions a row."""
    rows, vocabulary = make_rows(), tiny.CONFIG.vocab_size

    def positions_held(chunk: int) -> int:
        traced = gradient.trace(tiny.params(), rows, Compute(logits_chunk=chunk)).jaxpr
        shapes = (shape for shape in _shapes(traced.jaxpr) if len(shape) == 3 and shape[2] == vocabulary)
        return max(shape[1] for shape in shapes)

    assert positions_held(0) == 6
    assert positions_held(2) == 2


def _shapes(jaxpr) -> list[tuple[int, ...]]:
    """Shapes of all values that a jaxpr, and those within it, compute."""
    shapes = []
    for equation in jaxpr.eqns:
        shapes += [out.aval.shape for out in equation.outvars]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                shapes += _shapes(getattr(inner, "jaxpr", inner))
    return shapes


def test_bfloat16_is_close_and_gives_f32():
    rows = make_rows()
    exact_B, rounded_B = (logprobs(tiny.params(), rows, Compute(dtype=d)) for d in (jnp.float32, jnp.bfloat16))
    assert rounded_B.dtype == jnp.float32
    assert not np.array_equal(rounded_B, exact_B)
    np.testing.assert_allclose(rounded_B, exact_B, rtol=0.02)  # bfloat16 keeps 8 bits: 0.4 % a rounding
