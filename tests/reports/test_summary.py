"""metrics.py and report.py: what a run leaves behind for people."""

import json
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest

from spin_jax.errors import UserError
from spin_jax.reports import summary
from spin_jax.runtime import metric_writer


def write_steps(directory, steps, **options):
    with metric_writer.MetricsWriter(directory, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / step, "logps/real": -10.0 * step})


def steps_in(directory):
    return [row["step"] for row in metric_writer.read_metrics(directory / "metrics.jsonl")]


def tensorboard_events(directory):
    """(step, tag, value) of every scalar, and the steps at which older events are told to be forgotten."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, purges = [], []
    for path in sorted((directory / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, position = path.read_bytes(), 0
        while position < len(data):  # a TFRecord: length, its checksum, the bytes, their checksum
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 12 + length + 4
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            purges += [event.step] if event.HasField("session_log") else []
    return scalars, purges


def test_each_step_is_on_disk_at_once(tmp_path):
    writer = metric_writer.MetricsWriter(tmp_path)
    writer.write(1, {"loss": 0.5})
    assert metric_writer.read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5}
    ]  # while the writer is open
    writer.close()
    writer.close()


def test_numbers_come_back_as_they_were(tmp_path):
    import jax.numpy as jnp

    values = {"count": 3, "tiny": 1e-30, "third": 1 / 3, "none": None, "nan": float("nan"), "inf": float("-inf")}
    with metric_writer.MetricsWriter(tmp_path) as writer:
        writer.write(7, values | {"numpy": np.float32(0.1), "numpy_count": np.int64(2**40), "jax": jnp.asarray(0.5)})
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["nan"] is None and strict["not_finite"] == {"nan": "nan", "inf": "-inf"}

    (row,) = metric_writer.read_metrics(tmp_path / "metrics.jsonl")
    assert np.isnan(row.pop("nan")) and values.pop("nan")
    assert row == {"step": 7, "numpy": float(np.float32(0.1)), "numpy_count": 2**40, "jax": 0.5} | values
    assert isinstance(row["count"], int)


def test_scalars_reach_tensorboard(tmp_path):
    with metric_writer.MetricsWriter(tmp_path) as writer:
        writer.write(3, {"rewards/real": 0.25, "skipped": None})
    scalars, _ = tensorboard_events(tmp_path)
    assert scalars == [(3, "rewards/real", 0.25)]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(6, 10), resume_step=5)
    assert steps_in(tmp_path) == list(range(1, 10))
    assert tensorboard_events(tmp_path)[1] == [0, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_fresh_run_forgets_an_abandoned_one(tmp_path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(1, 3))
    assert steps_in(tmp_path) == [1, 2]


def test_not_finite_values_survive_a_resume(tmp_path):
    with metric_writer.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("inf")})
    write_steps(tmp_path, [2], resume_step=1)
    assert metric_writer.read_metrics(tmp_path / "metrics.jsonl")[0] == {"step": 1, "loss": float("inf")}


# What a kill or a power cut leaves at the end of the file.
@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b'{"step": 4, "loss": 0.', b"\0\0\0\0", b"\xff\xfe", b"{}"])
def test_a_half_written_last_line_is_dropped(tmp_path, tail):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert steps_in(tmp_path) == [1, 2, 3]
    write_steps(tmp_path, [4, 5], resume_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_a_killed_writer_loses_no_written_step(tmp_path):
    program = (
        "import os, sys; from spin_jax.runtime.metric_writer import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in range(1, 51): writer.write(step, {'loss': 0.5})\n"
        "os.kill(os.getpid(), 9)"
    )
    root = str(pathlib.Path(__file__).parents[2])
    finished = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONPATH": root})
    assert finished.returncode == -9
    assert steps_in(tmp_path) == list(range(1, 51))


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"loss": 1.0}', "3"])
def test_a_broken_line_inside_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: "):
        metric_writer.read_metrics(path)


def test_an_object_store_gets_the_whole_file_now_and_then(tmp_path, monkeypatch):
    """The rewriting path, on a local disk: an object store has no append."""
    monkeypatch.setattr(metric_writer, "is_remote", lambda path: True)
    write_steps(tmp_path, [1, 2])
    with metric_writer.MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(2, {"loss": 0.5})
        assert steps_in(tmp_path) == [1]
        writer.flush()
        assert steps_in(tmp_path) == [1, 2]
        monkeypatch.setattr(metric_writer, "REMOTE_SECONDS", 0.0)
        writer.write(3, {"loss": 0.25})
        assert steps_in(tmp_path) == [1, 2, 3]


def test_summary_table():
    rows = [
        {"model": "SFT", "valid": 0.91234, "kl": 0.02},
        {"model": "iteration 0", "valid": 0.95, "kl": float("nan"), "held_out/rewards/margin": 12.3456, "rows": 1000},
        {"model": "SFT, more steps", "valid": None, "kl": 0.0004, "held_out/rewards/margin": -0.5, "rows": 9},
    ]
    assert summary.summary_table(rows) == "\n".join(
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
    assert summary.summary_table([{"x": value}]).split()[-1] == cell
    assert summary.summary_table([{"x": np.float64(value)}]).split()[-1] == cell


def test_summary_is_written_whole_and_read_back(tmp_path):
    rows = [{"model": "SFT", "kl": float("inf")}, {"model": "iteration 0", "kl": 0.125, "iteration": 0}]
    summary.write_summary(tmp_path / "run", [{"model": "older"}])
    summary.write_summary(tmp_path / "run", rows)
    assert summary.read_summary(tmp_path / "run") == rows
    assert (tmp_path / "run" / "summary.txt").read_text() == summary.summary_table(rows) + "\n"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["summary.json", "summary.txt"]
    assert summary.read_summary(tmp_path) == []


def write_run(workdir, iterations, steps):
    for iteration in iterations:
        with metric_writer.MetricsWriter(workdir / f"iteration_{iteration}") as writer:
            for step in steps:
                writer.write(step, {"loss": 0.7 / step, "rewards/margin": 0.1 * step, "rewards/accuracy": None})


def drawn(plot, workdir, monkeypatch):
    """The axes of one plot, as matplotlib was asked to draw them."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw)))
    summary.plot_iterations(workdir)
    names = [each.name for each in summary.PLOTS]
    return figures[names.index(plot)].axes[0]


def test_plots_are_written(tmp_path):
    from matplotlib.image import imread

    assert summary.plot_iterations(tmp_path) == []
    write_run(tmp_path, [0, 1], range(1, 4))
    paths = summary.plot_iterations(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "margin.png", "accuracy.png"], "log-probs were not logged"
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        assert imread(os.fspath(path)).shape[:2] == (576, 1080)


def test_plots_count_steps_over_the_run(tmp_path, monkeypatch):
    write_run(tmp_path, [0, 1, 2, 10], range(2, 11, 2))  # logged every second step; ten sorts after two
    summary.write_summary(
        tmp_path,
        [
            {"model": "SFT", "iteration": None, "held_out/rewards/margin": 0.0},
            {"model": "iteration 1", "iteration": 1, "held_out/rewards/margin": 0.75},
            {"model": "iteration 2", "iteration": 2, "held_out/rewards/margin": None},
            {"model": "not trained yet", "iteration": 11, "held_out/rewards/margin": 9.0},
        ],
    )
    axes = drawn("margin", tmp_path, monkeypatch)
    curves = [line for line in axes.lines if line.get_alpha() is not None]
    assert [list(line.get_xdata()) for line in curves] == [
        list(range(start + 2, start + 11, 2)) for start in (0, 10, 20, 30)
    ]
    np.testing.assert_allclose(curves[0].get_ydata(), [0.2, 0.4, 0.6, 0.8, 1.0])
    (held_out,) = [line for line in axes.lines if line.get_label() == "margin, held-out"]
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([20], [0.75])
    assert [text.get_text() for text in axes.texts] == ["iteration 0", "iteration 1", "iteration 2", "iteration 10"]
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert sorted(labels) == ["margin", "margin, held-out", "no better than the opponent"]


def test_running_mean():
    values = np.arange(80.0)
    values[10] = np.nan
    means = summary._running_mean(values)  # a window of five
    np.testing.assert_allclose(means[[0, 9, 40, 79]], [1.0, (7 + 8 + 9 + 11) / 4, 40.0, 78.0])
    assert np.isnan(means[10]) and np.isnan(means).sum() == 1
    np.testing.assert_array_equal(summary._running_mean(np.array([3.0])), [3.0])
    assert np.isnan(summary._running_mean(np.array([np.nan]))).all()
