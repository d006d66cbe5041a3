"""The command as people type it: what it answers to mistakes, in which words and with which exit status."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_files

from spin_jax.data.pairs import read_sampled

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments: str, python: tuple[str, ...] = ("-m", "spin_jax.main")) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *python, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=300
    )


def assert_refused(result: subprocess.CompletedProcess, *parts: str):
    """One line on stderr with all of `parts`, and exit status 2."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith("spin_jax: "), result.stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert not result.stdout


BASE = ("--config=configs/base.py", "--workdir=never/made", "--config.model.path=m", "--config.data.train=d")
GENERATE, CHECK = ("-m", "spin_jax.generate"), ("-m", "spin_jax.compile_check")


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--workdir=never/made"], ["--config is missing: python -m spin_jax.main --workdir=never/made --config="]),
        (["--config=configs/base.py"], ["--config.model.path is empty"]),
        (["--config=configs/nowhere.py", "--workdir=never/made"], ["--config=configs/nowhere.py: no such file"]),
        (["--config=configs/zephyr_7b.py:v9-7", "--workdir=never/made"], ["'v9-7' is not a slice", "v5e-16"]),
        ([*BASE, "--config.train.lerning_rate=(1e-6,)"], ["--config.train.learning_rate?"]),
        ([*BASE, "--config.seed=4294967296"], ["--config.seed=4294967296 must be at most 2147483647"]),
        ([*BASE, "--workdr=x"], ["--workdr is not a flag: did you mean --workdir?"]),
        ([*BASE, "--coordinator=auto"], ["--coordinator=auto: jax does not find the other processes"]),
    ],
    ids=lambda value: value[-1] if value[-1].startswith("-") else "",
)
def test_a_mistake_in_the_command_is_one_line(arguments, parts):
    assert_refused(command(*arguments), *parts)
    assert not (ROOT / "never").exists()


@pytest.mark.parametrize(
    "python, arguments, parts",
    [
        (GENERATE, ["--workdir=w"], ["--workdir is not a flag"]),
        (GENERATE, ["--out=o"], ["spin_jax.generate --out=o --config=configs/base.py --prompts=prompts.jsonl"]),
        (GENERATE, ["--config=configs", "--prompts=p", "--out=o"], ["--config=configs: is a directory"]),
        (CHECK, [], ["python -m spin_jax.compile_check --config=configs/zephyr_7b.py:v5e-16"]),
        (CHECK, ["--config=configs/zephyr_7b.py:v5e-16", "--lengths=\u00b2,1,1"], ["write PROMPT,REAL,GENERATED"]),
        (CHECK, ["--config=configs/zephyr_7b.py:v5e-16", "--json=never/made/x.json"], ["--json=never/made/x.json"]),
        (CHECK, ["--config=configs/zephyr_7b.py", "--slice=v5e-16", "--config.mesh.fsdp=3"], ["--config.mesh.fsdp=16"]),
    ],
)
def test_a_mistake_in_another_command_is_one_line(python, arguments, parts):
    assert_refused(command(*arguments, python=python), *parts)


@pytest.mark.parametrize("program", ["main", "generate", "compile_check"])
def test_help_is_no_mistake(program):
    """It tells the flags that all commands have as well."""
    result = command("--help", python=("-m", f"spin_jax.{program}"))
    assert result.returncode == 0 and not result.stderr
    assert all(f"\n  {flag}: " in result.stdout for flag in ("--config", "--config.section.field"))


# Prints, when all is over, what of the packages that take long to import was imported.
TELLING = """
import atexit, runpy, sys
HEAVY = {"jax", "flax", "optax", "orbax", "transformers", "datasets", "tensorboardX", "matplotlib", "torch"}
atexit.register(lambda: print("imported:", sorted(HEAVY & set(sys.modules))))
runpy.run_module("spin_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("--help", "--config.section.field=value"),
        ("--config.iterations=0", "--config.iterations=0 must be at least 1"),
        ("--config.train.lerning_rate=1", "--config.train.lerning_rate is not a field"),
        ("--profile --stages=score", "--profile traces training steps"),
    ],
)
def test_help_and_mistakes_import_nothing_heavy(argument, answer):
    result = command(*BASE, *argument.split(), python=("-c", TELLING))
    assert answer in result.stdout + result.stderr
    assert result.stdout.endswith("imported: []\n")


def test_a_missing_file_of_data_is_one_line(tmp_path, tiny_model):
    missing = tmp_path / "nowhere.jsonl"
    paths = (f"--config.model.path={tiny_model}", f"--config.data.train={missing}")
    result = command("--config=configs/base.py", f"--workdir={tmp_path / 'run'}", *paths, "--config.mesh.fsdp=-1")
    assert_refused(result, str(missing))


# Prints, when all is over, how often jax asked its cache of compiled programs, and how often it was there.
COUNTING = """
import atexit, collections, jax
asked = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: asked.update([event.rpartition("/")[2]]))
atexit.register(lambda: print("asked:", asked["compile_requests_use_cache"], "found:", asked["cache_hits"]))
from spin_jax import main
main.run()
"""


def test_another_run_compiles_nothing_again(tmp_path, tiny_model, tiny_data, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = tiny_files.SETTINGS | {"model.path": tiny_model, "data.train": tiny_data, "generate.max_new_tokens": 3}
    overrides = [f"--config.{field}={value}" for field, value in settings.items()]
    arguments = ["--config=configs/base.py", "--stages=generate", *overrides]
    drawn = []
    for name, found in (("first", "0"), ("second", r"\1")):
        result = command(*arguments, f"--workdir={tmp_path / name}", python=("-c", COUNTING))
        assert re.search(rf"^asked: (\d+) found: {found}$", result.stdout, re.M), result.stdout + result.stderr
        programs = sorted(path.name for path in (tmp_path / "spin_jax" / "compiled").iterdir())
        drawn.append((programs, read_sampled(tmp_path / name / "iteration_0" / "generated" / "pairs.parquet")))
    assert drawn[0][0] == drawn[1][0] and any(name.startswith("jit_decode-") for name in drawn[0][0])
    np.testing.assert_equal(drawn[0][1], drawn[1][1])


def test_overrides_reach_the_run(tmp_path, tiny_model, tiny_data):
    """One iteration's sampling alone, from a config file, with overrides of every kind of field."""
    settings = tiny_files.SETTINGS | {"model.path": tiny_model, "data.train": tiny_data, "generate.max_new_tokens": 3}
    settings |= {"spin.beta": "(0.1,0.2)", "sft.control": "True", "train.micro_batches": 1}
    overrides = [f"--config.{field}={value}" for field, value in settings.items()]
    workdir = tmp_path / "run"
    result = command("--config=configs/smollm2_135m.py", f"--workdir={workdir}", "--stages=generate", *overrides)
    assert result.returncode == 0, result.stderr
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["spin.beta"] == [0.1, 0.2] and stored["sft.control"] is True
    assert stored["data.max_rows"] == 256  # the file's own
    sampled = read_sampled(workdir / "iteration_0" / "generated" / "pairs.parquet")
    assert len(sampled) == tiny_files.TRAIN_ROWS + tiny_files.EVAL_ROWS
    assert max(len(tokens) for [(tokens, _)] in sampled.values()) == 3
    assert "Traceback" not in result.stderr
