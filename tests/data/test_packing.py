"""Batches: which pairs a step takes, how they share rows, what they cost."""

import dataclasses
import itertools

import numpy as np
import pytest
import tiny

from spin_jax.data.packing import Packing, forward_flops, pack_batch, plan_scoring, plan_training, slots
from spin_jax.data.pairs import Pair, choose
from spin_jax.errors import UserError
from spin_jax.training.schedule import batch_order, num_steps


@pytest.mark.parametrize("rows, batch_size", [(12, 4), (10, 4), (7, 3), (3, 8), (1, 5)])
def test_every_row_comes_once_an_epoch(rows, batch_size):
    epochs = 6
    stream = batch_order(rows, batch_size, 42, epochs * rows).flatten()
    for epoch in stream[: epochs * rows].reshape(epochs, rows):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))


def test_what_a_step_takes_is_a_function_of_seed_and_step_alone():
    order = batch_order(50, 8, 7, 20)
    for steps in (1, 7, 13):
        np.testing.assert_array_equal(batch_order(50, 8, 7, steps), order[:steps])
    assert not np.array_equal(order, batch_order(50, 8, 8, 20))


def test_epochs_and_seeds_have_shuffles_of_their_own():
    shuffles = {tuple(epoch) for seed in range(5) for epoch in batch_order(30, 30, seed, 5)}
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


# ---- plans


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Lengths as of answers to instructions: many short, some long."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal((3.0, 4.0, 3.5), (0.6, 0.8, 0.7), (count, 3)), 1, 250).astype(int)
    return tiny.pairs(tuple(map(tuple, lengths)))


PAIRS = random_pairs(400)


@pytest.mark.parametrize("packing", [Packing(1, 16, 256), Packing(4, 32, 512), Packing(16, 64, 10_000)])
def test_a_training_plan_keeps_pairs_whole_and_batches_as_they_were(packing):
    order = batch_order(len(PAIRS), 32, 0, 25)
    plan = plan_training(PAIRS, order, packing)
    for chosen, rows, shape in zip(order, plan.batches, plan.shapes, strict=True):
        assert sorted(itertools.chain(*rows)) == sorted(chosen), "each pair of the batch, in one row"
        assert len(rows) == shape.rows and shape.rows % packing.num_shards == 0
        assert shape.length % packing.multiple == 0 and shape.targets % packing.multiple == 0
        for row in rows:
            assert sum(slots(PAIRS[i]) for i in row) <= shape.length
            assert sum(len(y) for i in row for y in PAIRS[i].responses) <= shape.targets
            assert len(row) <= shape.pairs
    assert len({shape.rows for shape in plan.shapes}) == 1
    assert len(set(plan.shapes)) == len({shape.length for shape in plan.shapes}), "one program a length"
    assert plan_training(PAIRS, order, packing) == plan


@pytest.mark.parametrize("num_shards, multiple, row_length", [(1, 16, 512), (4, 8, 1024), (16, 8, 10_000)])
@pytest.mark.parametrize("seed", range(3))
def test_a_stage_has_few_shapes_and_never_more_slots_than_with_fewer(num_shards, multiple, row_length, seed):
    pairs, taken = random_pairs(300, seed), []
    order = batch_order(len(pairs), 32, seed, 40)
    for most in (1, 2, 3, 5, 1000):
        packing = Packing(num_shards, multiple, row_length, most)
        plan = plan_training(pairs, order, packing)
        assert len(set(plan.shapes)) <= most
        assert {shape.rows % num_shards for shape in plan.shapes} == {0}
        for rows, shape in zip(plan.batches, plan.shapes, strict=True):
            assert max(sum(slots(pairs[i]) for i in row) for row in rows) <= shape.length
        taken.append(sum(shape.rows * shape.length for shape in plan.shapes))
        assert taken[-1] <= len(order) * max(shape.rows * shape.length for shape in plan.shapes)
    assert taken == sorted(taken, reverse=True) and taken[0] > taken[-1]


def test_fill_and_what_padding_would_have_taken():
    order = batch_order(len(PAIRS), 64, 0, 12)
    plan = plan_training(PAIRS, order, Packing(4, 16, 1024))
    total = sum(shape.rows * shape.length for shape in plan.shapes)
    used = sum(slots(PAIRS[i]) for i in order.flatten())
    assert plan.fill == used / total > 0.97
    padded = 0
    for chosen in order:
        lengths = [len(PAIRS[i].prompt) + len(y) for i in chosen for y in PAIRS[i].responses]
        padded += 128 * -(-max(lengths) // 16) * 16
    assert plan.saved == padded / total > 2
    assert f"{plan.fill:.1%} full" in str(plan)


def test_rows_are_not_left_empty_where_pairs_are_longer_than_rows_should_be():
    order = batch_order(len(PAIRS), 64, 0, 12)
    longest = max(slots(pair) for pair in PAIRS)
    plan = plan_training(PAIRS, order, Packing(4, 16, longest // 2))
    assert plan.fill > 0.9  # 0.54 with rows counted by half of the longest


def blank_pairs(slots_of_each: list[int]) -> list[Pair]:
    """Pairs that take so many slots."""
    prompt, responses = np.zeros(1, np.int32), [np.zeros(1 + (n - 1) // 2, np.int32) for n in slots_of_each]
    return [
        Pair(0, 0, prompt, (y, np.zeros(n - len(y) + 1, np.int32)), (False, False))
        for n, y in zip(slots_of_each, responses, strict=True)
    ]


def test_pairs_nearly_as_long_as_rows_get_a_row_each():
    """Two in a row of 1,856 would take half as much again, and twice the memory of a row of 1,024."""
    pairs = blank_pairs([912] * 24)
    assert {slots(pair) for pair in pairs} == {912}
    plan = plan_training(pairs, np.arange(24)[None], Packing(1, 128, 1024))
    assert plan.shapes[0][:2] == (24, 1024) and plan.fill == 912 / 1024


@pytest.mark.parametrize("num_shards, row_length", [(1, 1024), (8, 1024), (4, 4096), (16, 300)])
@pytest.mark.parametrize("seed", range(3))
def test_no_batch_takes_more_slots_than_one_of_the_longest_pairs(num_shards, row_length, seed):
    """What the compile check compiles is the most that any batch of a run needs."""
    rng = np.random.default_rng(seed)
    longest, size = 1000, 16
    lengths = np.concatenate([rng.integers(1, longest, 10 * size), [longest] * 4, [longest * 2 // 3] * size])
    pairs = blank_pairs(lengths.tolist())
    order = batch_order(len(pairs), size, seed, len(pairs) // size)
    packing = Packing(num_shards, 64, row_length)
    (bound,) = plan_training(blank_pairs([longest] * size), np.arange(size)[None], packing).shapes
    for shape in plan_training(pairs, order, packing).shapes:
        assert shape.rows * shape.length <= bound.rows * bound.length


def test_a_scoring_plan_is_one_program_and_scores_each_pair_once():
    plan = plan_scoring(PAIRS, 64, Packing(4, 64, 512))
    assert sorted(itertools.chain(*itertools.chain(*plan.batches))) == list(range(len(PAIRS)))
    assert len(set(plan.shapes)) == 1 and plan.shapes[0].rows % 4 == 0
    assert all(len(rows) == plan.shapes[0].rows for rows in plan.batches)
    assert plan.fill > 0.9  # of 105 rows, almost full, in seven batches of 16
    assert plan_scoring(PAIRS[:1], 64, Packing(4, 64, 512)).shapes[0].rows == 4


# ---- layout


def test_a_batch_holds_its_pairs():
    """Slot by slot and target by target, from the docstrings of PackedRows and Batch."""
    pairs, logps = tiny.pairs(), np.array([(-1.0 - i, -2.0 * i) for i in range(8)])
    batch, (of_row, of_place) = tiny.packed(pairs, opponent_logps=logps), tiny.places(pairs)
    arrays, rows = batch.arrays, batch.arrays.rows
    assert rows.tokens_BT.shape == (4, 32) and batch.rows.tolist() != list(range(8))
    padding = np.ones_like(rows.tokens_BT, bool)
    for pair, row, place in zip(pairs, of_row, of_place, strict=True):
        targets, start = {}, None
        for which, response in enumerate(pair.responses):
            owned = rows.response_ids_BR[row] == 2 * place + which
            np.testing.assert_array_equal(rows.targets_BR[row, owned], response)
            sources = rows.predictor_index_BR[row, owned]
            targets[which] = sources
            start = sources[0] - len(pair.prompt) + 1
            # What the predicting tokens are: the prompt's last, then the response without its last.
            np.testing.assert_array_equal(rows.tokens_BT[row, sources], np.r_[pair.prompt[-1], response[:-1]])
            np.testing.assert_array_equal(
                rows.positions_BT[row, sources], np.arange(len(response)) + len(pair.prompt) - 1
            )
        end = start + slots(pair)
        prompt = np.arange(start, start + len(pair.prompt))
        np.testing.assert_array_equal(rows.tokens_BT[row, prompt], pair.prompt)
        np.testing.assert_array_equal(rows.positions_BT[row, prompt], np.arange(len(pair.prompt)))
        # The prompt is seen by both responses, the real one by itself alone, the generated one by none after it.
        assert set(rows.visible_until_BT[row, prompt]) == {end}
        assert set(rows.visible_until_BT[row, targets[0][1:]]) <= {
            start + len(pair.prompt) + len(pair.responses[0]) - 1
        }
        assert set(rows.visible_until_BT[row, targets[1][1:]]) <= {end}
        assert padding[row, start:end].all(), "pairs do not overlap"
        padding[row, start:end] = False
        np.testing.assert_array_equal(arrays.reference_logps_BPY[row, place], logps[pair.row])
        np.testing.assert_allclose(arrays.weights_BP[row, place], 1 / 8)
    np.testing.assert_array_equal(
        rows.visible_until_BT[padding],
        np.broadcast_to(np.arange(1, 33), padding.shape)[padding],
        "padding sees itself alone",
    )
    assert (rows.response_ids_BR >= 0).sum() == sum(real + generated for _, real, generated in tiny.LENGTHS)
    np.testing.assert_allclose(arrays.weights_BP.sum(), 1)
    assert sorted(batch.rows) == list(range(8))
    assert batch.tokens == (~padding).sum() == sum(map(sum, tiny.LENGTHS)) - 16
    assert batch.host_metrics == {
        "lengths/real": 5.0,
        "lengths/generated": 5.125,
        "truncated/real": 0.0,
        "truncated/generated": 1 / 8,
        "fill": batch.tokens / 128,
    }


def test_unscored_pairs_have_nan_so_that_they_cannot_be_trained_on():
    arrays = tiny.packed(tiny.pairs()).arrays
    assert np.isnan(arrays.reference_logps_BPY).all()


def without_generated(pairs: list[Pair]) -> list[Pair]:
    return [choose(pair, ["real"]) for pair in pairs]


def test_sft_batch_holds_real_responses_and_weights_tokens_equally():
    batch = tiny.packed(without_generated(tiny.pairs()), sft=True)
    arrays = batch.arrays
    owners = arrays.rows.response_ids_BR[arrays.rows.response_ids_BR >= 0]
    assert len(owners) == 40
    np.testing.assert_allclose(arrays.weights_BP[arrays.weights_BP > 0], 1 / 40, rtol=1e-6)
    assert (arrays.weights_BP > 0).sum() == 8
    assert batch.host_metrics == {
        "lengths/real": 5.0,
        "truncated/real": 0.0,
        "fill": batch.tokens / arrays.rows.tokens_BT.size,
    }


# ---- FLOPs


@pytest.mark.parametrize("window", [None, 2])
def test_flops_equal_a_count_by_hand(window):
    """Every matmul of every token, 2 a multiply-add: D=32, F=48, V=64, 2 layers, 4 query and 2 kv heads of 8. A prompt
    of 3, responses of 4 and 2, whose last tokens predict nothing and are not read."""
    per_layer = 0
    for position in (0, 1, 2) + (3, 4, 5) + (3,):
        per_layer += 2 * 32 * (4 * 8)  # q
        per_layer += 2 * 2 * 32 * (2 * 8)  # k and v
        per_layer += 2 * (4 * 8) * 32  # o
        per_layer += 3 * 2 * 32 * 48  # gate, up, down
        per_layer += 2 * 2 * (4 * 8) * min(position + 1, window or 10)  # scores and values, over what it sees
    by_hand = 2 * per_layer + (4 + 2) * 2 * 32 * 64
    model = dataclasses.replace(tiny.CONFIG, sliding_window=window)
    assert forward_flops(model, tiny.pairs(((3, 4, 2),))[0]) == by_hand


def test_padding_costs_no_flops():
    pairs = tiny.pairs()
    tight, wide = (tiny.packed(pairs, Packing(rows, 64, 10_000)) for rows in (1, 8))
    assert tight.arrays.rows.tokens_BT.size < wide.arrays.rows.tokens_BT.size
    assert tight.flops == wide.flops and tight.tokens == wide.tokens


def test_layouts_name_their_pairs():
    pairs = tiny.pairs()
    plan = plan_training(pairs, np.array([[3, 5], [2, 0]]), Packing(1, 8, 16))
    batches = zip(plan.batches, plan.shapes, strict=True)
    assert [set(pack_batch(tiny.CONFIG, pairs, *batch).rows) for batch in batches] == [{3, 5}, {2, 0}]
