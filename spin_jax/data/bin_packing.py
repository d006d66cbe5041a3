"""Choose which pairs share a row: bin packing of their token counts. The result depends on the counts alone."""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Items in rows.

    Attributes:
        length: tokens that each row has room for.
        rows: for each row, the numbers of its items, in order. Rows may be empty.
    """

    length: int
    rows: list[list[int]]


def pack(sizes: Sequence[int], rows: int, multiple: int) -> Packed:
    """Pack items of such sizes into `rows` rows, whose length is the smallest multiple for which best fit succeeds."""
    length = round_up(max(max(sizes), math.ceil(sum(sizes) / rows)), multiple)
    while len(filled := best_fit(sizes, length)) > rows:
        length += multiple
    return Packed(length, filled + [[] for _ in range(rows - len(filled))])


def few_lengths(lengths: Sequence[int], most: int) -> list[int]:
    """Raise each length to one of at most `most` of the lengths, so that their sum is the least possible.

    Dynamic programming over the distinct lengths: best[j] is the least sum for the first j of them.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    before = np.r_[0, np.cumsum(counts)]
    raised = distinct * (before[1:] - before[:-1, None])  # [i, j]: the sum if distinct[i] to [j] become [j]
    raised = np.where(raised > 0, raised, np.iinfo(np.int64).max // 2)
    best, begins = np.r_[0, raised[0]], [np.zeros(len(distinct), int)]
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
    """Return the smallest multiple that is not below `number`."""
    return math.ceil(number / multiple) * multiple


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: put the largest item first, each into the fullest row that has room for it, else into a new
    row.

    The number of rows is at most 11/9 of the fewest possible and a constant (Johnson et al. 1974), and nearer to it if
    items are small.

    Args:
        sizes: none above `capacity`.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> the rows that have it
    rooms: list[int] = []  # the keys whose list is not empty, in order
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
