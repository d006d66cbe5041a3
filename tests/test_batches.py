"""Batches: which rows a step takes, how they are padded, what they cost."""

import dataclasses

import numpy as np
import pytest
import tiny

from spin_jax.batches import Padding, batch_indices, forward_flops, num_steps, pair_batch, sft_batch
from spin_jax.errors import UserError

TO_LONGEST = Padding(multiple=1, longest=64)


@pytest.mark.parametrize("rows, batch_size", [(12, 4), (10, 4), (7, 3), (3, 8), (1, 5)])
def test_every_row_comes_once_an_epoch(rows, batch_size):
    epochs = 6
    stream = np.concatenate([batch_indices(rows, batch_size, 42, step) for step in range(epochs * rows)])
    for epoch in stream[: epochs * rows].reshape(epochs, rows):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))


def test_batch_indices_are_a_function_of_seed_and_step_alone():
    forwards = [batch_indices(50, 8, 7, step) for step in range(20)]
    backwards = [batch_indices(50, 8, 7, step) for step in reversed(range(20))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert not np.array_equal(forwards, [batch_indices(50, 8, 8, step) for step in range(20)])


def test_epochs_and_seeds_have_shuffles_of_their_own():
    shuffles = {tuple(batch_indices(30, 30, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(shuffles) == 25
    assert tuple(range(30)) not in shuffles


@pytest.mark.parametrize(
    "rows, epochs, batch_size, steps",
    [(64, 1, 64, 1), (100, 2, 64, 3), (50_000, 2, 64, 1562), (100, 0.5, 10, 5), (10, 0.1, 1, 1), (30, 0.7, 7, 3)],
)
def test_num_steps(rows, epochs, batch_size, steps):
    assert num_steps(rows, epochs, batch_size) == steps


def test_too_few_rows_for_one_batch_are_refused():
    with pytest.raises(UserError, match=r"10 rows x 2 epochs do not fill one batch of 64.*config\.train\.batch_size"):
        num_steps(10, 2.0, 64)


@pytest.mark.parametrize("tokens, length", [(1, 8), (8, 8), (9, 16), (17, 20), (20, 20)])
def test_padding_rounds_up_to_a_multiple_but_not_beyond_the_longest(tokens, length):
    assert Padding(multiple=8, longest=20)(tokens) == length
    assert Padding(multiple=0, longest=20)(tokens) == 20


def test_pair_batch_holds_the_pairs():
    pairs = [dataclasses.replace(p, real_logp=-1.0 - p.row, generated_logp=-2.0 * p.row) for p in tiny.pairs()]
    batch = pair_batch(tiny.CONFIG, pairs, TO_LONGEST)
    arrays = batch.arrays
    assert arrays.tokens_B2T.shape == (8, 2, 20)  # the longest row has 12 + 8 tokens
    assert arrays.responses_B2R.shape == (8, 2, 9)
    for i, pair in enumerate(pairs):
        for j, response in enumerate((pair.real, pair.generated)):
            row = np.concatenate([pair.prompt, response])
            np.testing.assert_array_equal(arrays.tokens_B2T[i, j], np.pad(row, (0, 20 - len(row))))
            np.testing.assert_array_equal(arrays.responses_B2R[i, j], np.pad(response, (0, 9 - len(response))))
            assert arrays.response_lengths_B2[i, j] == len(response)
        assert arrays.prompt_lengths_B[i] == len(pair.prompt)
    np.testing.assert_array_equal(arrays.opponent_logps_B2, [[-1.0 - i, -2.0 * i] for i in range(8)])
    assert arrays.opponent_logps_B2.dtype == np.float32
    np.testing.assert_array_equal(batch.rows, np.arange(8))
    assert batch.tokens == sum(2 * prompt + real + generated for prompt, real, generated in tiny.LENGTHS)
    assert batch.facts == {"lengths/real": 5.0, "lengths/generated": 5.125, "cut/real": 0.0, "cut/generated": 1 / 8}


def test_unscored_pairs_have_nan_so_that_they_cannot_be_trained_on():
    assert np.isnan(pair_batch(tiny.CONFIG, tiny.pairs(), TO_LONGEST).arrays.opponent_logps_B2).all()


def test_sft_batch_holds_real_responses_and_weights_tokens_equally():
    pairs = tiny.pairs()
    batch = sft_batch(tiny.CONFIG, pairs, TO_LONGEST)
    rows = batch.arrays.rows
    assert rows.tokens_BT.shape == (8, 16) and rows.responses_BR.shape == (8, 9)
    for i, pair in enumerate(pairs):
        row = np.concatenate([pair.prompt, pair.real])
        np.testing.assert_array_equal(rows.tokens_BT[i], np.pad(row, (0, 16 - len(row))))
        np.testing.assert_array_equal(rows.responses_BR[i], np.pad(pair.real, (0, 9 - len(pair.real))))
    np.testing.assert_array_equal(rows.prompt_lengths_B, [prompt for prompt, _, _ in tiny.LENGTHS])
    np.testing.assert_array_equal(rows.response_lengths_B, [real for _, real, _ in tiny.LENGTHS])
    np.testing.assert_allclose(batch.arrays.weights_B, 8 / 40, rtol=1e-6)  # 8 rows, 40 response tokens
    assert batch.tokens == sum(prompt + real for prompt, real, _ in tiny.LENGTHS)


@pytest.mark.parametrize("window", [None, 2])
def test_flops_equal_a_count_by_hand(window):
    """Every matmul of every token, 2 a multiply-add: D=32, F=48, V=64, 2 layers, 4 query and 2 kv heads of 8."""
    lengths, scored = [5, 3], [2, 1]
    per_layer = 0
    for length in lengths:
        for position in range(length):
            per_layer += 2 * 32 * (4 * 8)  # q
            per_layer += 2 * 2 * 32 * (2 * 8)  # k and v
            per_layer += 2 * (4 * 8) * 32  # o
            per_layer += 3 * 2 * 32 * 48  # gate, up, down
            # scores and values, over the tokens that it sees
            per_layer += 2 * 2 * (4 * 8) * min(position + 1, window or length)
    by_hand = 2 * per_layer + 3 * 2 * 32 * 64
    model = dataclasses.replace(tiny.CONFIG, sliding_window=window)
    assert forward_flops(model, np.array(lengths), np.array(scored)) == by_hand


def test_padding_costs_no_flops():
    pairs = tiny.pairs()
    tight, wide = (pair_batch(tiny.CONFIG, pairs, Padding(0, longest)) for longest in (32, 64))
    assert tight.arrays.tokens_B2T.shape != wide.arrays.tokens_B2T.shape
    assert tight.flops == wide.flops and tight.tokens == wide.tokens
    real = sft_batch(tiny.CONFIG, pairs, TO_LONGEST)
    generated = sft_batch(tiny.CONFIG, [dataclasses.replace(p, real=p.generated) for p in pairs], TO_LONGEST)
    assert tight.flops == real.flops + generated.flops
