"""Measures of a model's own answers, on responses that can be counted by hand."""

import pytest

from spin_jax.evaluation.samples import LONGEST, _short, distinct_ngrams, repeated_ngrams


def test_distinct_ngrams_are_counted_over_all_responses():
    """[1 2 3] and [1 2 4]: 12, 23, 12, 24."""
    assert distinct_ngrams([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert distinct_ngrams([[1, 2, 3]], 2) == 1
    assert distinct_ngrams([[1], []], 2) == 0


def test_repeated_ngrams_are_counted_within_a_response():
    """Of 1 2 1 2 1 2 the 2-grams are 12 21 12 21 12: three of five were there before."""
    loop = [1, 2, 1, 2, 1, 2]
    assert repeated_ngrams([loop], 2) == pytest.approx(3 / 5)
    assert repeated_ngrams([loop, [1, 2, 3]], 2) == pytest.approx(3 / 10)
    assert repeated_ngrams([[1], []], 2) == 0


def test_what_is_shown_cannot_move_the_cursor():
    text = "a\x1b[2Jb\u202ec\nd" + "x" * 500
    shown = _short(text)
    assert shown.isprintable() and shown.startswith("a\ufffd[2Jb\ufffdc d") and len(shown) == LONGEST
