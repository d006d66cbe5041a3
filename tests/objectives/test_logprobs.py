"""Summed log-probs of packed pairs: against rows of their own with all logits, and by other routes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import padded
import pytest
import tiny

from spin_jax.data.batch import Batch
from spin_jax.data.packing import Packing, pack_batch, plan_scoring
from spin_jax.data.pairs import Pair
from spin_jax.devices.sharding import make_mesh
from spin_jax.models import REMAT_POLICIES, Execution
from spin_jax.objectives.logprobs import Scores, pair_logprobs, pair_scores

# (prompt, real, generated) tokens: short beside long, responses of one token, one of none.
LENGTHS = ((1, 6, 4), (10, 6, 9), (3, 1, 2), (7, 4, 1), (5, 3, 0), (4, 0, 2))
PLAIN = Execution(remat="none")
IN_TWO_ROWS, ONE_EACH = Packing(2, 1, 1000), Packing(len(LENGTHS), 32, 32)


def make_batch(packing: Packing = IN_TWO_ROWS, pad_seed: int | None = None) -> Batch:
    """LENGTHS, packed; the padding is id 0, or random ids."""
    batch = tiny.packed(tiny.pairs(LENGTHS), packing).arrays
    if pad_seed is not None:
        rng, rows = np.random.default_rng(pad_seed), batch.rows
        lonely_BT = rows.visible_until_BT == np.arange(1, rows.visible_until_BT.shape[1] + 1)
        # A pair's last token ends with itself, too; it is behind nobody's target.
        lonely_BT &= np.roll(lonely_BT, 1, axis=1)
        rows.tokens_BT[lonely_BT] = tiny.tokens(rng, lonely_BT.sum())
        nobodys_BR = rows.response_ids_BR < 0
        rows.targets_BR[nobodys_BR] = tiny.tokens(rng, nobodys_BR.sum())
        assert lonely_BT.any() and nobodys_BR.any()
    return batch


@functools.partial(jax.jit, static_argnums=2)
def logprobs(params: dict, batch: Batch, execution: Execution) -> jax.Array:
    return pair_logprobs(tiny.CONFIG, params, batch, execution)


@functools.partial(jax.jit, static_argnums=2)
def gradient(params: dict, batch: Batch, execution: Execution) -> dict:
    """Of a weighted sum, so that no response's gradient can stand in for another's."""

    def weighted(params: dict) -> jax.Array:
        logps_BP2 = pair_logprobs(tiny.CONFIG, params, batch, execution)
        return jnp.sum(jnp.arange(1.0, logps_BP2.size + 1).reshape(logps_BP2.shape) * logps_BP2)

    return jax.grad(weighted)(params)


def assert_trees_close(actual: dict, expected: dict, share: float) -> None:
    """Every leaf within `share` of the expected leaf's largest element."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        name = jax.tree_util.keystr(path)
        other = functools.reduce(lambda tree, key: tree[key.key], path, actual)
        largest = np.max(np.abs(leaf))
        assert largest > 0, f"{name}: no gradient to compare"
        np.testing.assert_allclose(other, leaf, rtol=0, atol=share * largest, err_msg=name)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packing", [IN_TWO_ROWS, ONE_EACH, Packing(1, 16, 1)], ids=["two rows", "one each", "short"])
def test_packed_pairs_have_the_logprobs_and_gradients_of_rows_of_their_own(packing, window):
    """Also with a sliding window, whose distances are those of positions and not of slots."""
    config, pairs = dataclasses.replace(tiny.CONFIG, sliding_window=window), tiny.pairs(LENGTHS)
    batch = make_batch(packing)
    weights_P2 = jnp.arange(1.0, 2 * len(pairs) + 1).reshape(-1, 2)
    places = tiny.places(pairs, packing)

    def packed_sum(params: dict) -> tuple[jax.Array, jax.Array]:
        logps_P2 = pair_logprobs(config, params, batch, PLAIN)[places]
        return jnp.sum(weights_P2 * logps_P2), logps_P2

    def padded_sum(params: dict) -> tuple[jax.Array, jax.Array]:
        logps_P2 = padded.pair_logprobs(config, params, pairs, PLAIN)
        return jnp.sum(weights_P2 * logps_P2), logps_P2

    packed_grads, packed_P2 = jax.jit(jax.grad(packed_sum, has_aux=True))(tiny.params())
    padded_grads, padded_P2 = jax.jit(jax.grad(padded_sum, has_aux=True))(tiny.params())
    assert padded_P2[4, 1] == packed_P2[4, 1] == 0, "an empty response has log-prob 0"
    np.testing.assert_allclose(packed_P2, padded_P2, rtol=2e-6)
    # Two computations in another order, each off by the f32 rounding of sums of some hundred terms.
    assert_trees_close(packed_grads, padded_grads, 1e-5)


@pytest.mark.parametrize(
    ("count", "attention"), [(1, "plain"), (2, "tiled"), (3, "plain"), (3, "tiled"), (3, "flash"), (4, "tiled")]
)
def test_any_number_of_responses_to_a_prompt_are_blind_to_each_other(count, attention):
    """Log-prob by log-prob and gradient by gradient, against a row for each response."""
    rng = np.random.default_rng(count)
    pairs = [
        Pair(row, 0, tiny.tokens(rng, prompt), tuple(tiny.tokens(rng, 1 + (row + 3 * y) % 7) for y in range(count)), ())
        for row, prompt in enumerate((1, 9, 4, 6))
    ]
    computed = Execution(remat="none")
    if attention != "plain":
        computed = Execution(remat="none", kernel=attention, mesh=make_mesh(devices=jax.devices()[:1]))
    plan = plan_scoring(pairs, len(pairs), Packing(2, 8, 24))
    batch = pack_batch(tiny.CONFIG, pairs, plan.batches[0], plan.shapes[0]).arrays
    assert plan.shapes[0].responses == count and len(plan.batches) == 1
    order = list(itertools.chain(*plan.batches[0]))
    weights = jnp.arange(1.0, count * len(pairs) + 1).reshape(-1, count)

    def packed_sum(params: dict) -> tuple[jax.Array, jax.Array]:
        logps_BPY = pair_logprobs(tiny.CONFIG, params, batch, computed)
        logps = logps_BPY[batch.weights_BP > 0]
        return jnp.sum(weights[jnp.array(order)] * logps), logps

    def padded_sum(params: dict) -> tuple[jax.Array, jax.Array]:
        logps = padded.pair_logprobs(tiny.CONFIG, params, pairs, PLAIN)
        return jnp.sum(weights * logps), logps

    packed_grads, packed = jax.jit(jax.grad(packed_sum, has_aux=True))(tiny.params())
    padded_grads, by_rows = jax.jit(jax.grad(padded_sum, has_aux=True))(tiny.params())
    np.testing.assert_allclose(packed, by_rows[jnp.array(order)], rtol=5e-6)
    assert_trees_close(packed_grads, padded_grads, 1e-5)


@pytest.mark.parametrize("chunk", [0, 3])
def test_entropy_and_accuracy_are_those_of_all_logits_and_have_no_gradient(chunk):
    batch, pairs, places = make_batch(), tiny.pairs(LENGTHS), tiny.places(tiny.pairs(LENGTHS), IN_TWO_ROWS)
    execution = dataclasses.replace(PLAIN, logits_chunk=chunk)

    def scores(params: dict) -> Scores:
        return pair_scores(tiny.CONFIG, params, batch, execution)

    found, expected = scores(tiny.params()), padded.pair_scores(tiny.CONFIG, tiny.params(), pairs, PLAIN)
    for x_BPY, x_P2 in zip(found, expected, strict=True):
        np.testing.assert_allclose(x_BPY[places], x_P2, rtol=1e-5, atol=1e-5)
    assert 0 < float(expected[2].sum()) < sum(real + generated for _, real, generated in LENGTHS)
    gradient = jax.grad(lambda params: scores(params).entropy.sum() + scores(params).correct.sum())(tiny.params())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_ids_in_the_padding_change_no_bit():
    batch = make_batch(ONE_EACH)
    plain = logprobs(tiny.params(), batch, PLAIN)
    for seed in range(3):
        np.testing.assert_array_equal(logprobs(tiny.params(), make_batch(ONE_EACH, pad_seed=seed), PLAIN), plain)
    assert_trees_close(
        gradient(tiny.params(), make_batch(ONE_EACH, pad_seed=0), PLAIN), gradient(tiny.params(), batch, PLAIN), 1e-6
    )


@pytest.mark.parametrize("chunk", [2, 4, 100])
def test_chunks_of_any_size_give_the_same_values_and_gradients(chunk):
    batch, chunked = make_batch(), Execution(remat="none", logits_chunk=chunk)
    plain = logprobs(tiny.params(), batch, PLAIN)
    np.testing.assert_allclose(logprobs(tiny.params(), batch, chunked), plain, rtol=2e-6)
    assert_trees_close(gradient(tiny.params(), batch, chunked), gradient(tiny.params(), batch, PLAIN), 5e-6)


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES.keys() - {"none"}))
def test_remat_policies_give_the_same_gradients(remat):
    batch = make_batch()
    assert_trees_close(
        gradient(tiny.params(), batch, Execution(remat=remat)), gradient(tiny.params(), batch, PLAIN), 5e-6
    )


def test_no_more_than_a_chunk_of_logits_is_ever_held():
    """Forward and backward pass: every array with a vocabulary axis has at most `chunk` positions a row."""
    batch, vocabulary = make_batch(), tiny.CONFIG.vocab_size

    def positions_held(chunk: int) -> int:
        traced = gradient.trace(tiny.params(), batch, Execution(logits_chunk=chunk)).jaxpr
        shapes = (shape for shape in _shapes(traced.jaxpr) if len(shape) == 3 and shape[2] == vocabulary)
        return max(shape[1] for shape in shapes)

    assert positions_held(0) == batch.rows.targets_BR.shape[1]
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
    batch = make_batch()
    exact, rounded = (logprobs(tiny.params(), batch, Execution(dtype=d)) for d in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, rtol=0.02)  # bfloat16 keeps 8 bits: 0.4 % a rounding
