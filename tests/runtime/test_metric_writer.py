"""What a run measures, step by step, on disk and for TensorBoard."""

import json
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest

from spin_jax.errors import UserError
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
