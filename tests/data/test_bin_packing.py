"""Bin packing of token counts."""

import itertools

import numpy as np
import pytest

from spin_jax.data.bin_packing import best_fit, few_lengths, pack, round_up


def sizes_of(seed: int, count: int = 200) -> list[int]:
    return np.random.default_rng(seed).integers(1, 100, count).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_holds_all_and_overflows_nothing(seed):
    sizes = sizes_of(seed)
    rows = best_fit(sizes, 128)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[item] for item in row) <= 128 for row in rows)
    assert len(rows) <= 11 / 9 * np.ceil(sum(sizes) / 128) + 4


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_is_the_rule_done_slowly(seed):
    """Largest first, into the fullest row with room."""
    sizes = sizes_of(seed, 60)
    loads: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row, load in enumerate(loads) if load + size <= 100]
        if fitting:
            loads[max(fitting, key=lambda row: loads[row])] += size
        else:
            loads.append(size)
    assert sorted(sum(sizes[item] for item in row) for row in best_fit(sizes, 100)) == sorted(loads)


def test_best_fit_finds_the_perfect_fit():
    assert sorted(map(sorted, best_fit([6, 4, 7, 3, 5, 5], 10))) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("rows", "multiple"), [(1, 1), (3, 8), (16, 32), (300, 16)])
def test_pack_finds_the_shortest_rows(rows, multiple):
    sizes = sizes_of(0)
    length, packed = pack(sizes, rows, multiple)
    assert len(packed) == rows and length % multiple == 0
    assert sorted(item for row in packed for item in row) == list(range(len(sizes)))
    assert max(sum(sizes[item] for item in row) for row in packed) <= length
    shorter = length - multiple
    assert shorter < max(sizes) or len(best_fit(sizes, shorter)) > rows


@pytest.mark.parametrize("seed", range(40))
def test_few_lengths_are_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    lengths, most = (8 * rng.integers(1, 9, rng.integers(1, 12))).tolist(), int(rng.integers(1, 6))
    raised = few_lengths(lengths, most)
    assert len(raised) == len(lengths) and len(set(raised)) <= most and set(raised) <= set(lengths)
    assert all(long >= length for long, length in zip(raised, lengths, strict=True))
    choices = [chosen for k in range(1, most + 1) for chosen in itertools.combinations(sorted(set(lengths)), k)]
    whole = [chosen for chosen in choices if chosen[-1] == max(lengths)]
    assert sum(raised) == min(sum(min(c for c in chosen if c >= x) for x in lengths) for chosen in whole)


def test_few_lengths_of_one_is_the_longest_and_of_enough_as_they_were():
    lengths = sizes_of(1)
    assert few_lengths(lengths, 1) == [max(lengths)] * len(lengths)
    assert few_lengths(lengths, len(set(lengths))) == few_lengths(lengths, 1000) == lengths


def test_round_up():
    assert [round_up(number, 8) for number in (0, 0.1, 8, 9)] == [0, 8, 8, 16]
