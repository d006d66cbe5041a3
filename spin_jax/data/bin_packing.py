"""Which pairs share a row: bin packing of token counts, a function of the counts alone."""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Items in rows.

    Attributes:
        length: tokens that each row has room for.
        rows: for each row the numbers of its items, in order; some may be empty.
    """

    length: int
    rows: list[list[int]]


def pack(sizes: Sequence[int], rows: int, multiple: int) -> Packed:
    """Items of so many tokens in `rows` rows, as short as best fit finds, of a length that is a multiple."""
    length = round_up(max(max(sizes), math.ceil(sum(sizes) / rows)), multiple)
    while len(filled := best_fit(sizes, length)) > rows:
        length += multiple
    return Packed(length, filled + [[] for _ in range(rows - len(filled))])


def few_lengths(lengths: Sequence[int], most: int) -> list[int]:
    """Each length raised to one of at most `most` of them, with the least sum that there is."""
    distinct, counts = np.unique(lengths, return_counts=True)
    before = np.r_[0, np.cumsum(counts)]
    raised = distinct * (before[1:] - before[:-1, None])  # [i, j]: what is from distinct[i] to distinct[j], as the last
    raised = np.where(raised > 0, raised, np.iinfo(np.int64).max // 2)
    best, begins = np.r_[0, raised[0]], [np.zeros(len(distinct), int)]  # best[j]: of the first j distinct lengths
    for _ in range(1, min(most, len(distinct))):
        sums = best[:-1, None] + raised
        begins.append(sums.argmin(axis=0))
        best = np.r_[0, sums.min(axis=0)]
    chosen, end = [], len(distinct)
    while end:
        chosen.insert(0, distinct[end - 1])
        end = begins.pop()[end - 1]
    return [int(chosen[place]) for place in np.searchsorted(chosen, lengths)]


def round_up(number: float, multiple: int) -> int:
    """The next multiple that is not below."""
    return math.ceil(number / multiple) * multiple


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the largest first, each into the fullest row that has room for it, else into a new one.

    At most 11/9 of the fewest possible rows, and a constant (Johnson et al. 1974); far fewer where items are small.

    Args:
        sizes: none above `capacity`.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the room that they have left
    rooms: list[int] = []  # of some row, in order
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(rooms, sizes[item])
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(place)
        else:
            row, room = len(rows), capacity
            rows.append([])
        rows[row].append(item)
        left = room - sizes[item]
        if not by_room.setdefault(left, []):
            bisect.insort(rooms, left)
        by_room[left].append(row)
    return rows
