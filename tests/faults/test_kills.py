"""A run that is killed again and again ends, bit for bit, as one that never was.

Each process below ends itself at an exact point, by the signal named, inside the real command; the next one is the same
command again.
"""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import tiny_files

from spin_jax.runtime.metric_writer import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {"train.epochs": 2.0}  # 4 steps, then 8
STEPS = (4, 8)
TIMED = {"seconds", "tokens_per_second", "model_tflops_per_second"}

# Python run before the command: `die(NUMBER)` sends the process a signal.
DIE = "import os, signal\ndef die(number): os.kill(os.getpid(), number)\n"

IN_GENERATION_WITH_A_TORN_FILE = """
from spin_jax.generation import response_files
write_whole = response_files.write_whole
def write(path, content):
    if path.name == "part-00001.p000.jsonl":
        path.with_name(path.name + ".partial").write_text(content[: len(content) // 2])
        die(signal.SIGKILL)
    write_whole(path, content)
response_files.write_whole = write
"""
ASKED_IN_GENERATION = """
from spin_jax.generation import response_files
write_whole = response_files.write_whole
def write(path, content):
    write_whole(path, content)
    if path.name == "part-00001.p000.jsonl":
        die(signal.SIGTERM)
response_files.write_whole = write
"""
IN_TRAINING = """
from spin_jax.runtime.metric_writer import MetricsWriter
write_row = MetricsWriter.write
def write(writer, step, values):
    write_row(writer, step, values)
    if "iteration_{t}" in str(writer._path) and step == {step}:
        die(signal.{signal})
MetricsWriter.write = write
"""
IN_EXPORT = """
from spin_jax.checkpoints import safetensors
write_tensors = safetensors.write
def write(file, shapes, dtype, tensors):
    write_tensors(file, shapes, dtype, tensors)
    if "iteration_1" in str(file):
        die(signal.SIGKILL)
safetensors.write = write
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs the command on a workdir, with code put in front of it, on one device; returns the finished process."""
    directory = tmp_path_factory.mktemp("tiny")
    model = tiny_files.write_model(directory / "model")
    data = tiny_files.write_jsonl(directory / "rows.jsonl", tiny_files.make_rows())
    settings = tiny_files.SETTINGS | SETTINGS | {"model.path": model, "data.train": data}
    overrides = [f"--config.{field}={value}" for field, value in settings.items()]
    # Compiled programs are kept: the processes here differ in what they do, not in what they compile.
    variables = {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
    }

    def run(workdir: pathlib.Path, first: str = "") -> subprocess.CompletedProcess:
        code = f"{DIE}{first}\nfrom spin_jax import main\nmain.run()"
        arguments = [f"--config={ROOT / 'configs' / 'base.py'}", f"--workdir={workdir}", *overrides]
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def logged(workdir: pathlib.Path, t: int) -> list[dict]:
    """The rows of metrics, without what a clock measured."""
    rows = read_metrics(workdir / f"iteration_{t}" / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def checkpoints(workdir: pathlib.Path, t: int) -> set[int]:
    return {int(path.name) for path in (workdir / f"iteration_{t}" / "checkpoints").iterdir() if path.name.isdigit()}


def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished = command(whole)
    assert finished.returncode == 0, finished.stderr

    result = command(killed, IN_GENERATION_WITH_A_TORN_FILE)
    assert result.returncode == -signal.SIGKILL, result.stderr
    generated = killed / "iteration_0" / "generated"
    noted, parts = "settings.json", ["part-00000.p000.jsonl", "part-00001.p000.jsonl"]
    assert {path.name for path in generated.iterdir()} == {noted, parts[0], f"{parts[1]}.partial"}
    first_part = (generated / "part-00000.p000.jsonl").stat().st_mtime_ns

    result = command(killed, ASKED_IN_GENERATION)
    assert result.returncode == 75, result.stderr
    assert "start the same command again" in result.stderr and "Traceback" not in result.stderr
    assert {path.name for path in generated.iterdir()} == {noted, *parts}
    assert (generated / "part-00000.p000.jsonl").stat().st_mtime_ns == first_part  # not drawn again

    result = command(killed, IN_TRAINING.format(t=0, step=2, signal="SIGTERM"))
    assert result.returncode == 75, result.stderr
    assert "stopped after step 2 of 4; start the same command again to go on" in result.stderr
    assert max(checkpoints(killed, 0)) == 2 and len(logged(killed, 0)) == 2

    result = command(killed, IN_TRAINING.format(t=1, step=6, signal="SIGKILL"))
    assert result.returncode == -signal.SIGKILL, result.stderr
    # The save of step 5 may or may not have ended; that of 4 has. Step 6 is in the metrics, and will be made again.
    assert max(checkpoints(killed, 1)) in (4, 5) and len(logged(killed, 1)) == 6

    result = command(killed, IN_EXPORT)
    assert result.returncode == -signal.SIGKILL, result.stderr
    model = killed / "iteration_1" / "model"
    assert (model / "model.safetensors").exists() and not (model / "config.json").exists()
    assert max(checkpoints(killed, 1)) == 8

    result = command(killed)
    assert result.returncode == 0, result.stderr
    for t, steps in enumerate(STEPS):
        directories = [workdir / f"iteration_{t}" for workdir in (whole, killed)]
        weights = [(directory / "model" / "model.safetensors").read_bytes() for directory in directories]
        assert weights[0] == weights[1]
        responses = [pyarrow.parquet.read_table(directory / "generated" / "pairs.parquet") for directory in directories]
        logprobs = [np.concatenate(table["generated_logprobs"].to_pylist()) for table in responses]
        np.testing.assert_allclose(*logprobs, atol=1e-5)  # who is in the slots beside it changes a sum's order
        responses = [table.drop_columns("generated_logprobs") for table in responses]
        assert responses[0].equals(responses[1])
        scores = [np.load(directory / "scores" / "steps.npz")["logps"] for directory in directories]
        np.testing.assert_array_equal(*scores)
        assert [row["step"] for row in logged(killed, t)] == list(range(1, steps + 1))
        assert logged(killed, t) == logged(whole, t)
        assert (directories[0] / "result.json").read_text() == (directories[1] / "result.json").read_text()
    assert (whole / "summary.txt").read_text() == (killed / "summary.txt").read_text()

    def files(workdir):  # event files are named by the second
        return {str(f.relative_to(workdir)) for f in workdir.rglob("*") if f.is_file() and "tfevents" not in f.name}

    assert files(killed) == files(whole)
