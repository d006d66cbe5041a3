"""Figures of the page: round ticks, means, and no more points than a screen has."""

import re

import numpy as np
import pytest

from spin_jax.reports import svg


def test_steps_have_whole_ticks_and_values_round_ones():
    assert svg.ticks(0, 3, 5, whole=True) == [0, 1, 2, 3] and svg.ticks(0, 248, 5, whole=True) == [0, 50, 100, 150, 200]
    np.testing.assert_allclose(svg.ticks(0.956, 1.151, 5), [1.0, 1.05, 1.1, 1.15])
    assert svg.ticks(-1e-7, 1e-7, 5)[0] == pytest.approx(-1e-7)


def test_running_mean():
    values = np.arange(80.0)
    values[10] = np.nan
    means = svg.running_mean(values)  # a window of five
    np.testing.assert_allclose(means[[0, 9, 40, 79]], [1.0, (7 + 8 + 9 + 11) / 4, 40.0, 78.0])
    assert np.isnan(means[10]) and np.isnan(means).sum() == 1
    np.testing.assert_array_equal(svg.running_mean(np.array([3.0])), [3.0])
    assert np.isnan(svg.running_mean(np.array([np.nan]))).all()


def test_a_long_curve_has_no_more_points_than_a_screen_and_keeps_its_peaks():
    steps, values = np.arange(1.0, 100_001.0), np.zeros(100_000)
    values[77_777] = 5.0
    picture = svg.curves([svg.Series("x", [(steps, values)])], svg.Range(0, 1e5), svg.Range(0, 5), {})
    raw, mean = re.findall(r'<path class="(?:raw|mean) s0" d="([^"]*)"', picture)
    assert raw.count("L") < svg.POINTS and mean.count("L") == svg.POINTS - 1
    assert f",{svg.TOP:.1f}" in raw, "the peak"


def test_gaps_and_infinities_are_not_drawn():
    values = np.array([1.0, np.nan, 2.0, np.inf])
    assert svg.Range.of(values) == pytest.approx((0.95, 2.05)) and svg.Range.of([np.nan]).high > 0
    picture = svg.curves([svg.Series("x", [(np.arange(4.0), values)])], svg.Range(0, 3), svg.Range.of(values), {})
    assert "nan" not in picture and "inf" not in picture and picture.count("<circle") == 2


def test_a_histogram_holds_every_value():
    values = {"real": np.array([3.0, 4.0, 4.0, 900.0]), "generated": np.array([3.0])}
    picture = svg.histogram(values, svg.Range.of(np.concatenate(list(values.values()))), whole=True)
    assert picture.count('class="area') == 2
    assert svg.histogram({"real": np.array([2.0])}, svg.Range.of([2.0]), whole=True).count("area") == 1
