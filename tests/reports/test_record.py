"""A run's record is what its files say; reports are written from it."""

import json

import pytest

from spin_jax.reports import REPORTS
from spin_jax.reports.record import RunRecord, read_result, write_reports, write_result
from spin_jax.runtime import metric_writer

ROWS = [
    {"model": "SFT", "iteration": None, "kl": float("inf")},
    {"model": "iteration 0", "iteration": 0, "kl": 0.125},
    {"model": "SFT control 0", "iteration": None, "kl": 0.25},
]


def write_run(workdir) -> None:
    """The files of a run of two iterations, the second of which still trains."""
    (workdir / "config.json").write_text(json.dumps({"iterations": 2, "train.batch_size": 8}))
    for directory, row in zip(("", "iteration_0", "iteration_0/control"), ROWS, strict=True):
        write_result(workdir / directory, row)
    for t, steps in enumerate((3, 2)):
        with metric_writer.MetricsWriter(workdir / f"iteration_{t}") as writer:
            for step in range(1, steps + 1):
                writer.write(step, {"loss": 0.7 / step})


def test_a_run_is_read_from_its_files(tmp_path):
    write_run(tmp_path)
    record = RunRecord.load(tmp_path)
    assert record.results == ROWS and record.config["train.batch_size"] == 8
    assert {t: [row["step"] for row in rows] for t, rows in record.metrics.items()} == {0: [1, 2, 3], 1: [1, 2]}


def test_of_a_run_that_has_made_nothing_everything_is_empty(tmp_path):
    assert RunRecord.load(tmp_path) == RunRecord(tmp_path, {}, [], {}, {"SFT": tmp_path})


def test_a_result_of_an_earlier_version_has_todays_names(tmp_path):
    (tmp_path / "result.json").write_text('{"model": "iteration 0", "iteration": 0, "generated/cut": 0.5}')
    assert read_result(tmp_path) == {"model": "iteration 0", "iteration": 0, "generated/truncated": 0.5}


@pytest.mark.parametrize("content", ["", "[]", '{"model": "SFT"}', "not json"])
def test_a_damaged_result_is_none_and_said_so(tmp_path, content, caplog):
    (tmp_path / "result.json").write_text(content)
    assert read_result(tmp_path) is None and "is damaged: measured again" in caplog.text


def test_every_registered_report_is_written(tmp_path, own_registries):
    REPORTS.register("count", lambda record: {"of/mine.txt": f"{len(record.results)} models"})
    write_run(tmp_path)
    write_reports(RunRecord.load(tmp_path))
    assert (tmp_path / "of" / "mine.txt").read_text() == "3 models"
    assert (tmp_path / "summary.json").exists() and (tmp_path / "report.html").exists()
