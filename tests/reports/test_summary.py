"""The table of a run's models."""

import numpy as np
import pytest

from spin_jax.reports.record import RunRecord
from spin_jax.reports.summary import read_summary, summary, summary_table


def test_summary_table():
    rows = [
        {"model": "SFT", "valid": 0.91234, "kl": 0.02},
        {"model": "iteration 0", "valid": 0.95, "kl": float("nan"), "held_out/rewards/margin": 12.3456, "rows": 1000},
        {"model": "SFT, more steps", "valid": None, "kl": 0.0004, "held_out/rewards/margin": -0.5, "rows": 9},
    ]
    assert summary_table(rows) == "\n".join(
        [
            "                                 held_out",
            "                                  rewards",
            "model             valid      kl    margin  rows",
            "---------------  ------  ------  --------  ----",
            "SFT              0.9123  0.0200         -     -",
            "iteration 0      0.9500     nan     12.35  1000",
            "SFT, more steps       -  0.0004     -0.50     9",
        ]
    )


def test_columns_beyond_the_width_go_below_behind_the_models_again():
    rows = [{"model": "SFT", "a": 1, "bcd/e": 2, "f": 3}, {"model": "iteration 0", "a": 4, "bcd/e": 5, "f": 6}]
    first, second = summary_table(rows, width=22).split("\n\n")
    assert [line.split() for line in second.splitlines()[-2:]] == [["SFT", "3"], ["iteration", "0", "6"]]
    assert [line.split() for line in first.splitlines()[-2:]] == [["SFT", "1", "2"], ["iteration", "0", "4", "5"]]
    assert max(map(len, (first + second).splitlines())) <= 22
    assert len(summary_table(rows, width=1).split("\n\n")) == 3, "a column that is too wide stands alone"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (5e-7, "5.000e-07"),
        (0.00012, "1.200e-04"),
        (0.5, "0.5000"),
        (0.0, "0.000"),
        (99.95, "99.95"),
        (123456.7, "123457"),
    ],
)
def test_summary_digits(value, cell):
    assert summary_table([{"x": value}]).split()[-1] == cell
    assert summary_table([{"x": np.float64(value)}]).split()[-1] == cell


def test_summary_is_read_back_as_it_was(tmp_path):
    rows = [{"model": "SFT", "kl": float("inf")}, {"model": "iteration 0", "kl": 0.125, "iteration": 0}]
    files = summary(RunRecord(tmp_path, {}, rows, {}))
    assert files.keys() == {"summary.json", "summary.txt"} and files["summary.txt"] == summary_table(rows) + "\n"
    assert read_summary(tmp_path) == []
    (tmp_path / "summary.json").write_text(files["summary.json"])
    assert read_summary(tmp_path) == rows
