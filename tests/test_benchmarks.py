"""benchmarks/train_step.py with real contestants, on a tiny model; what packed_step.py says without a compiler; gpu.py,
tiny and on a CPU; and what curves.py runs and draws."""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny_files
from absl.testing import flagsaver

from spin_jax import config as config_lib
from spin_jax import main  # noqa: F401  (defines its flags)
from spin_jax.runtime import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARK = [sys.executable, ROOT / "benchmarks/train_step.py"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """The flags that name a model and a file of eight pairs of different lengths."""
    directory = tmp_path_factory.mktemp("benchmark")
    tiny_files.write_model(directory / "model")
    with (directory / "pairs.jsonl").open("w") as file:
        for i in range(8):
            question = {"role": "user", "content": "why? " * (1 + i % 3)}
            answers = {"real": "because " * (i + 1), "generated": "so " * (9 - i)}
            turns = {k: [question, {"role": "assistant", "content": answer}] for k, answer in answers.items()}
            file.write(json.dumps(turns) + "\n")
    return [f"--model={directory / 'model'}", f"--pairs={directory / 'pairs.jsonl'}"]


def test_layouts_and_opponents_in_turn(files, tmp_path):
    flags = [*files, "--batch_size=4", "--batches=2", "--passes=1", f"--json={tmp_path / 'report.json'}"]
    command = [*BENCHMARK, *flags, "spin_jax/f32", "trl/f32", "spin_jax/f32-padded-live"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "trl/f32: left out, --peer_python is not given" in run.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    (duel,) = report["duels"]
    assert duel["name"] == "spin_jax/f32-padded-live" and duel["same"]
    assert len(duel["rounds"]) == 2  # batches x passes
    packed, padded = duel["losses"]
    assert packed[0] == pytest.approx(math.log(2), abs=1e-6)
    assert packed[1] != packed[0]
    assert padded == pytest.approx(packed, abs=1e-5)
    for steps in duel["rounds"]:
        for step in steps.values():
            assert 0 < step["cpu_seconds"] and 0 < step["seconds"]
            assert step["peak_rss"] > 2**26  # jax alone takes more
    tokens = report["pairs"]["tokens a step"]
    assert tokens["padded to the batch's longest"] > tokens["no padding"] > tokens["no padding, prompt once"]


def test_a_contestant_that_fails_says_why(files, tmp_path):
    """A Python that lacks the peers' packages, as where the wrong one is given."""
    command = [*BENCHMARK, *files, "--batch_size=4", "--batches=1", f"--peer_python={sys.executable}"]
    run = subprocess.run([*command, "trl/f32"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "trl/f32 ended: its last words are above"


def test_too_few_pairs(files):
    run = subprocess.run(
        [*BENCHMARK, *files, "--batches=4", "--batch_size=8"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    assert "has 8 pairs, not 4 batches of 8: lower --batches" in run.stderr


def test_rows_that_more_devices_split_are_less_full():
    spec = importlib.util.spec_from_file_location("packed_step", ROOT / "benchmarks/packed_step.py")
    packed_step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packed_step)
    config = packed_step.load_config("v5e-16,code")
    fills = [packed_step.fill(config, num_shards, batches=20) for num_shards in packed_step.WAYS]
    assert 1 > fills[0] and fills == sorted(fills, reverse=True) and fills[-1] > 0.4


def test_matmuls(tmp_path):
    flags = ["--tokens=16", "--rounds=2", f"--json={tmp_path / 'matmuls.json'}"]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/matmuls.py", *flags], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "matmuls.json").read_text())
    assert set(report["matmuls"]) == {"q", "k, v", "o", "gate, up", "down"}
    for name, found in report["matmuls"].items():
        assert set(found["gflops"]) == {"float32", "bfloat16"} and found["ratio"] > 0
        assert f"{name:8} result in float32" in run.stdout


def test_growth_is_measured_and_drawn(files, tmp_path):
    """With a tiny model, and no compiler for TPUs: the lengths alone."""
    model = files[0]
    flags = [model, "--lengths=64,128", "--tokens=256", "--slices=", f"--json={tmp_path / 'growth.json'}"]
    command = [sys.executable, ROOT / "benchmarks/growth.py", *flags, f"--plot={tmp_path / 'growth.png'}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lengths = json.loads((tmp_path / "growth.json").read_text())["lengths"]
    assert [set(one["seconds"]) for one in lengths] == [{"tiled", "plain"}] * 2
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_sampling_contestants_in_turn(files, tmp_path):
    """Slots against batches to their slowest response: the same tokens, in fewer steps."""
    script = [
        sys.executable,
        ROOT / "benchmarks/sampling.py",
        *(flag.replace("--pairs", "--prompts") for flag in files),
    ]
    flags = ["--count=8", "--cap=24", "--rounds=1", f"--json={tmp_path / 'report.json'}"]
    run = subprocess.run(
        [*script, *flags, "spin_jax/8", "spin_jax/8-static", "transformers/4"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "transformers/4: left out, --peer_python is not given" in run.stdout
    (answers,) = json.loads((tmp_path / "report.json").read_text())["rounds"]
    slots, static = answers["spin_jax/8"], answers["spin_jax/8-static"]
    assert slots["lengths"] == static["lengths"] and slots["tokens"] == sum(slots["lengths"])
    assert 0 < slots["occupancy"] <= 1 and 0 < slots["seconds"]

    flags = ["--count=8", "--caps=4,24", f"--json={tmp_path / 'caps.json'}"]
    run = subprocess.run([*script, *flags, "spin_jax/8"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    short, long = json.loads((tmp_path / "caps.json").read_text())["caps"]
    assert (short["cap"], short["static"], short["refilled"]) == (4, 4, 4) and long["mean length"] > 4


def test_rounding_is_nothing_in_the_steps_own_program(tmp_path):
    model = tiny_files.write_model(tmp_path / "model")
    rows = [{"instruction": f"count to {i}", "response": "one two three four"[: 4 + i]} for i in range(16)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = [f"--model={model}", f"--rows={tmp_path / 'rows.json'}", "--pairs=8"]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/rounding.py", *flags], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    kinds = ("float", "bfloa", "after")
    found = {line[:28].strip(): line[28:].split() for line in run.stdout.splitlines() if line[:5] in kinds}
    assert found["bfloat16, the step's own"] == ["0.0000"] * 3 + ["0.6931"]
    assert float(found["bfloat16 against float32"][0]) > 0 < float(found["after a step"][0])


def test_compile_time_tells_of_every_program(tmp_path):
    config = tmp_path / "small.py"
    lines = [
        "from spin_jax.config import base_config",
        "def get_config(path):",
        "    config = base_config()",
        "    config.model.path = path",
        "    return config",
    ]
    config.write_text("\n".join(lines))
    flags = [f"--config={config}:HuggingFaceTB/SmolLM2-135M-Instruct", f"--json={tmp_path / 'times.json'}"]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/compile_time.py", *flags], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["anew"].keys() == times["cached"].keys() and "train step" in times["anew"]
    assert "train step       lowered" in run.stdout


def test_memory_of_a_gpu_that_is_not_here():
    command = [sys.executable, ROOT / "benchmarks/memory.py", "smollm2_135m", "rtx4090-1", "lora.rank=16"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (row,) = [line for line in ran.stdout.splitlines() if line.startswith("| rtx4090-1 | 20.6 |")]
    assert re.search(r"\| 0\.5 params \+ 0\.3 copy \+ [\d.]+ cache = [\d.]+ \|", row), row
    assert "0.3 frozen params" in row


def test_steps_of_refilled_slots(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sampling

    assert sampling.steps_when_refilled([5, 1, 1, 1, 1], 2) == 5
    assert sampling.steps_when_refilled([1, 1, 1, 5], 2) == 6
    assert sampling.steps_when_refilled([3, 4], 8) == 4
    (row,) = sampling.by_cap([9, 1, 2, 9], 2, [6])
    assert (row["static"], row["refilled"], row["mean length"]) == (12, 9, 3.75)


def test_curves_of_runs_that_a_config_allows(monkeypatch, tmp_path):
    """And pictures of made-up metrics, as small as a page wants them, the healthy run in grey."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    import curves

    for name in curves.RUNS:
        with flagsaver.flagsaver():
            words = curves.command(name, tmp_path)
            assert cli.parse_flags(words[1:]) == words[1:2], "every word but the module is a flag"
            config_lib.freeze(cli.config())
    assert {picture.run for picture in curves.PICTURES.values()} == set(curves.RUNS)
    logged = {metric for picture in curves.PICTURES.values() for panel in picture.panels for metric, _ in panel.curves}
    noise = np.random.default_rng(0)
    rows = [{"step": step, **{metric: noise.uniform(0.1, 1) for metric in logged}} for step in range(1, 250)]
    for name, picture in curves.PICTURES.items():
        svg = curves.draw(picture, {curves.HEALTHY: {0: rows, 1: rows}, picture.run: {0: rows, 1: rows}})
        ElementTree.fromstring(svg)
        assert len(svg) < 60_000, name
        assert (curves.GREY in svg.decode()) and (b"healthy" in svg) == (picture.run != curves.HEALTHY)


def test_gpu_in_one_command(tmp_path):
    """All that does not need a GPU of a job of each kind that computes; the file has what was measured."""
    script, parts = ROOT / "benchmarks/gpu.py", "--parts=machine,train/7b,attention,peers/train/7b"
    flags = [parts, "--size=tiny", f"--json={tmp_path / 'gpu.json'}", "--patience=4"]
    run = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    jobs = report["jobs"]
    assert list(jobs) == ["machine", "train/7b", "attention", "peers/train/7b"] and report["platform"] == "cpu"
    assert jobs["peers/train/7b"] == {"error": "left out: --peer_python has no trl"}
    assert not any("error" in job for job in list(jobs.values())[:3]), jobs
    assert {"card", "cudnn", "jax", "jaxlib", "nvidia-smi"} <= jobs["machine"].keys()
    step = jobs["train/7b"]
    assert step["pairs_per_second"] == pytest.approx(step["pairs"] / step["step_seconds"])
    assert step["model_tflop_per_second"] == pytest.approx(step["model_tflop"] / step["step_seconds"])
    assert step["constants"]["attention"] == "tiled" and step["options"]["lora_rank"] == 16
    found = jobs["attention"]["lengths"]["128"]["paths"]
    assert {"plain", "tiled"} <= found.keys() and jobs["attention"]["fastest_128"] in found
    for path in found.values():
        assert path["ms"] > 0 and all(0 < error < 0.02 for error in path["error"].values())
    assert "train/7b " in run.stdout


def test_gpu_jobs_that_fail_or_hang(monkeypatch, tmp_path):
    """Their last words are kept, and nothing that they have started goes on."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    assert gpu.run_process([sys.executable, "-c", "print('fine')"], 60, tmp_path, {}) is None
    assert gpu.run_process([sys.executable, "-c", "raise SystemExit('no card')"], 60, tmp_path, {}) == "no card\n"
    os.mkfifo(tmp_path / "pipe")
    told = os.fdopen(os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK))
    child = f"import time; told = open({str(tmp_path / 'pipe')!r}, 'w'); time.sleep(60); print('late', file=told)"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    error = gpu.run_process([sys.executable, "-c", parent], 1.5, tmp_path, {})
    assert error in ("stopped after 2 seconds\nbegun\n", "stopped after 2 seconds\n")
    os.set_blocking(told.fileno(), True)
    assert told.read() == ""  # at once, as nobody holds the other end
    told.close()
    script = [sys.executable, ROOT / "benchmarks/gpu.py", "--platform=cpu", "--parts=run", "--seconds=0"]
    none = subprocess.run([*script, f"--json={tmp_path / 'none.json'}"], capture_output=True, text=True, timeout=60)
    assert none.returncode == 1 and none.stderr == "nothing else is tried: a GPU is needed, or --size=tiny\n"
    assert gpu.line({"seconds": 2.0, "error": "a\nb\n"}) == "    2 s  ERROR b"


def test_gpu_is_done_in_eight_minutes(monkeypatch):
    """With our jobs at their limits; the peers take what these leave."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    assert gpu.SECONDS <= 8 * 60
    assert sum(job.seconds for name, job in gpu.JOBS.items() if not job.package and name != "run") <= gpu.SECONDS
    assert all((ROOT / "benchmarks/gpu_parts" / f"{job.file}.py").exists() for job in gpu.JOBS.values())
