"""Whole runs by several processes: they end as one process does, and stop and go on together."""

import functools
import json
import pathlib
import re
import signal

import numpy as np
import pyarrow.parquet
import pytest
import tiny_files
from processes import run_command

from spin_jax.checkpoints import safetensors
from spin_jax.runtime.metric_writer import read_metrics

# Fewer kinds of program to compile than with the pairs of the iteration before mixed in.
SETTINGS = tiny_files.SETTINGS | {"spin.previous_iterations": 0}
# One iteration of many steps, whose programs would all be on their way at once if nobody waited for any.
LONG = SETTINGS | {"iterations": 1, "train.epochs": 16.0, "train.learning_rate": (1e-4,), "train.checkpoint_every": 10}
STEPS = 32

ASK = "import os, signal\ndef ask(number): os.kill(os.getpid(), number)\n"
# What process 1 runs before the command: a signal to itself, when it sends a batch to its devices.
IN_TRAINING = (
    ASK
    + """
from spin_jax.training import loop
to_devices, sent = loop.to_devices, []
def send_and_ask(*arguments):
    sent.append(1)
    if len(sent) == {batch}:
        ask(signal.{signal})
    return to_devices(*arguments)
loop.to_devices = send_and_ask
"""
)
IN_GENERATION = (
    IN_TRAINING.replace("training import loop", "generation import engine")
    .replace("loop.", "engine.")
    .format(batch=2, signal="SIGTERM")
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, tiny_data):
    """(workdir, settings, processes, devices of each, code in front) -> how each process ended."""
    cache = tmp_path_factory.mktemp("compiled_by_processes")

    def on_hosts(workdir, settings, processes, devices, first=None, expected=0):
        settings = settings | {"model.path": tiny_model, "data.train": tiny_data}
        overrides = [f"--config.{field}={value}" for field, value in settings.items()]
        arguments = ["--config=configs/base.py", f"--workdir={workdir}", *overrides]
        ended = run_command(arguments, processes, first, devices=devices, cache=cache)
        if expected is not None:
            assert [process.status for process in ended] == [expected] * processes, ended[-1].output + ended[0].output
        return ended

    return on_hosts


@pytest.fixture(scope="module")
def long_run(run, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run by one process on two devices, with what it printed into a file beside it."""
    workdir = tmp_path_factory.mktemp("long")
    (ended,) = run(workdir, LONG, processes=1, devices=2)
    workdir.with_suffix(".log").write_text(ended.output)
    return workdir


def test_what_is_printed_into_a_file_is_some_dozens_of_lines_with_their_time(long_run):
    printed = long_run.with_suffix(".log").read_bytes().decode()
    assert "\r" not in printed and "\b" not in printed
    timed = re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)$", printed, re.M)
    assert len(timed) <= 40  # of a run of 32 steps
    (last,) = [line for _, line in timed if line.startswith("iteration 0: train: 32 of 32 steps, ")]
    assert re.search(r"loss [\d.e-]+, margin [\d.e-]+, accuracy [\d.]+, .* a (second|step), took ", last)


def responses(workdir: pathlib.Path, t: int) -> pyarrow.Table:
    """Without their log-probs: which slots share a step changes the order of sums."""
    table = pyarrow.parquet.read_table(workdir / f"iteration_{t}" / "generated" / "pairs.parquet")
    return table.drop_columns("generated_logprobs")


def scores(workdir: pathlib.Path, t: int) -> np.ndarray:
    with np.load(workdir / f"iteration_{t}" / "scores" / "steps.npz") as stored:
        return stored["logps"]


def metrics(workdir: pathlib.Path, t: int) -> list[dict]:
    """Without what a clock measured."""
    rows = read_metrics(workdir / f"iteration_{t}" / "metrics.jsonl")
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def tensors(workdir: pathlib.Path, t: int) -> dict[str, np.ndarray]:
    header = safetensors.read_header(workdir / f"iteration_{t}" / "model" / "model.safetensors")
    return {name: stored.map() for name, stored in header.items()}


def files(workdir: pathlib.Path) -> set[str]:
    return {str(f.relative_to(workdir)) for f in workdir.rglob("*") if f.is_file() and "tfevents" not in f.name}


def assert_same_bits(a: pathlib.Path, b: pathlib.Path):
    assert responses(a, 0).equals(responses(b, 0))
    np.testing.assert_array_equal(scores(a, 0), scores(b, 0))
    assert metrics(a, 0) == metrics(b, 0)
    for name, tensor in tensors(a, 0).items():
        np.testing.assert_array_equal(tensor, tensors(b, 0)[name])
    assert (a / "summary.json").read_text() == (b / "summary.json").read_text()
    assert files(a) == files(b)


def test_two_processes_of_four_devices_end_as_one_of_eight_and_as_one_device(run, tmp_path):
    """Eight numbers can be added in other orders, so the losses agree to f32's rounding, and the params to what RMSProp
    makes of it: it divides each gradient by its root mean square, however small that is."""
    two, one, single = (tmp_path / name for name in ("two", "one", "single"))
    ended = run(two, SETTINGS, processes=2, devices=4)
    run(one, SETTINGS, processes=1, devices=8)
    run(single, SETTINGS, processes=1, devices=1)
    for other in (one, single):
        assert files(two) == files(other)
        for t in range(2):
            assert responses(two, t).equals(responses(other, t))
            np.testing.assert_allclose(scores(two, t), scores(other, t), rtol=1e-6, atol=1e-5)
            for a, b in zip(metrics(two, t), metrics(other, t), strict=True):
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
                assert a["lengths/real"] == b["lengths/real"] and a["truncated/generated"] == b["truncated/generated"]
            others = tensors(other, t)
            for name, tensor in tensors(two, t).items():
                np.testing.assert_allclose(tensor, others[name], rtol=0, atol=1e-4)
    # Only the first process shows anything.
    assert "the last policy: " in ended[0].output and "iteration 1: train: " in ended[0].output
    assert "the last policy: " not in ended[1].output and "iteration 1: train: " not in ended[1].output


def test_stopped_killed_and_gone_on_by_other_processes_a_run_ends_with_the_same_bits(run, long_run, tmp_path):
    """On two devices, of one process or of two, a sum over devices is a + b or b + a: there is no other order."""
    by_two = functools.partial(run, tmp_path, LONG, processes=2, devices=1)
    ended = by_two(first={1: IN_GENERATION}, expected=75)
    assert all("start the same command again" in process.output for process in ended)
    generated = tmp_path / "iteration_0" / "generated"
    assert {path.suffixes[0] for path in generated.glob("part-*")} <= {".p000", ".p001"}
    ended_before = [json.loads(line) for part in generated.glob("part-*") for line in part.read_text().splitlines()]
    assert 0 < len(ended_before) < tiny_files.TRAIN_ROWS + tiny_files.EVAL_ROWS

    # One process takes over what two began. Batches are sent one ahead: the 7th when step 6 is to come.
    run(tmp_path, LONG, 1, 2, first={0: IN_TRAINING.format(batch=7, signal="SIGTERM")}, expected=75)
    assert len(metrics(tmp_path, 0)) == 6
    answered = responses(tmp_path, 0).to_pydict()
    for line in ended_before:
        assert answered["generated_tokens"][answered["row"].index(line["row"])] == line["tokens"]

    # Of two the second is asked, and both stop. The wish is read a step late.
    ended = by_two(first={1: IN_TRAINING.format(batch=3, signal="SIGTERM")}, expected=75)
    assert all(f"stopped after step 9 of {STEPS}; start the same" in process.output for process in ended)
    assert len(metrics(tmp_path, 0)) == 9

    # Killed, it asks nobody: the first finds out that it is alone, and ends.
    ended = by_two(first={1: IN_TRAINING.format(batch=15, signal="SIGKILL")}, expected=None)
    assert ended[1].status == -signal.SIGKILL and ended[0].status not in (0, 75)
    assert not (tmp_path / "iteration_0" / "model" / "config.json").exists()

    by_two()  # 12 steps in one go
    assert_same_bits(tmp_path, long_run)
