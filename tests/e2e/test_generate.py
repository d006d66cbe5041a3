"""Sampling alone: the responses of a run, in the prompts' order, whole or not at all, and never of two settings."""

import doctest
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet
import pytest
import tiny_files
from processes import free_port, run_together

import spin_jax

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = tiny_files.SETTINGS | {"generate.prompt_bucket": 8}  # prompts of two widths

# Python run before the command: it is killed when its second batch is written.
KILLED = """
import os, signal
from spin_jax.generation import response_files
write_whole = response_files.write_whole
def write(path, content):
    write_whole(path, content)
    if path.name == "part-00001.p000.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
response_files.write_whole = write
"""
# Run after it.
COMMAND = """
import sys
from spin_jax import generate
from spin_jax.runtime import cli
cli.run(generate.main)
"""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> pathlib.Path:
    """The prompts of the tiny data, without their responses."""
    rows = [{"prompt": row["prompt"]} for row in tiny_files.make_rows()]
    return tiny_files.write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


def flags(model, prompts, out, settings=SETTINGS) -> list[str]:
    overrides = [f"--config.{field}={value}" for field, value in (settings | {"model.path": model}).items()]
    return [f"--config={ROOT}/configs/base.py", f"--prompts={prompts}", f"--out={out}", *overrides]


def run(*arguments: str, python: tuple[str, ...] = ("-m", "spin_jax.generate")) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *python, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=300
    )


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(some: list[dict], others: list[dict]) -> bool:
    """The same answers. The sums in their log-probs depend on who shared the steps."""
    return some == [other | {"logp": pytest.approx(other["logp"], abs=1e-3)} for other in others]


def test_answers_are_a_runs_responses_in_the_prompts_order(finished, tiny_model, prompts, tmp_path):
    out = tmp_path / "new" / "answers.jsonl"
    spin_jax.answer(tiny_model, prompts, out, tiny_files.SETTINGS)
    sampled = pyarrow.parquet.read_table(finished.workdir / "iteration_0" / "generated" / "pairs.parquet").to_pylist()
    assert read(out) == [
        {
            "prompt": row["generated"][0]["content"],
            "response": row["generated"][1]["content"],
            "tokens": len(row["generated_tokens"]),
            "logp": pytest.approx(sum(row["generated_logprobs"]), abs=1e-3),
            "truncated": row["generated_truncated"],
        }
        for row in sorted(sampled, key=lambda row: row["row"])
    ]
    assert [row["prompt"] for row in read(out)] == [row["prompt"] for row in tiny_files.make_rows()]
    assert {row["truncated"] for row in read(out)} == {True, False}
    assert os.listdir(out.parent) == [out.name]


def test_a_response_depends_on_weights_seed_and_row_alone(finished, tiny_model, prompts, tmp_path):
    def answers(name, model=tiny_model, **changes):
        spin_jax.answer(model, prompts, tmp_path / name, tiny_files.SETTINGS | changes)
        return [row["response"] for row in read(tmp_path / name)]

    first = answers("first")
    assert answers("model", finished.workdir / "iteration_0" / "model") != first
    assert answers("seed", seed=7) != first
    conversations = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in tiny_files.make_rows()[:3]]
    few = tiny_files.write_jsonl(tmp_path / "few.jsonl", conversations)
    spin_jax.answer(tiny_model, few, tmp_path / "few", tiny_files.SETTINGS)
    assert [row["response"] for row in read(tmp_path / "few")] == first[:3]
    assert [row["prompt"] for row in read(tmp_path / "few")] == [row["messages"] for row in conversations]


def test_further_responses_leave_the_first_as_it_was(tiny_model, prompts, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    spin_jax.answer(tiny_model, prompts, one, SETTINGS)
    spin_jax.answer(tiny_model, prompts, many, SETTINGS | {"generate.responses": 3})
    first, *others = (read(many)[n::3] for n in range(3))
    assert same(first, read(one))
    for other in others:
        assert [row["prompt"] for row in other] == [row["prompt"] for row in first]
        assert [row["response"] for row in other] != [row["response"] for row in first]
    assert [row["response"] for row in others[0]] != [row["response"] for row in others[1]]


def test_a_response_ends_before_its_first_stop_string(tiny_model, prompts, tmp_path):
    spin_jax.answer(tiny_model, prompts, tmp_path / "whole", SETTINGS)
    whole = read(tmp_path / "whole")
    texts = [row["response"] for row in whole]
    stops = [next(text[2:4] for text in texts if len(text) > 4), next(text[1] for text in texts[::-1] if len(text) > 2)]
    spin_jax.answer(tiny_model, prompts, tmp_path / "stopped", SETTINGS | {"generate.stop_strings": tuple(stops)})
    changed = 0
    for row, before in zip(read(tmp_path / "stopped"), whole, strict=True):
        # The tokens up to there are the same: a character each, or nothing that a text shows.
        ends = [before["response"].find(stop) + len(stop) for stop in stops if stop in before["response"]]
        expected = min(ends, default=None)
        if expected is None:
            assert same([row], [before])
            continue
        assert before["response"].startswith(row["response"]) and not any(stop in row["response"] for stop in stops)
        assert expected <= row["tokens"] <= before["tokens"] and not row["truncated"]
        changed += 1
    assert 2 <= changed < len(whole)


def test_killed_between_two_batches_it_goes_on_and_mixes_nothing(tiny_model, prompts, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "tried [1]" / "out.jsonl"
    spin_jax.answer(model, prompts, whole, SETTINGS)

    killed = run(*flags(model, prompts, out), python=("-c", KILLED + COMMAND))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    parts = out.with_name("out.jsonl.parts")
    names = {"settings.json", "part-00000.p000.jsonl", "part-00001.p000.jsonl", "lease.json"}
    assert set(os.listdir(parts)) == names and not out.exists()
    before = {path.name: (path.read_text(), path.stat().st_mtime_ns) for path in parts.glob("[ps]*")}

    def refusal(prompts=prompts, **changes):
        with pytest.raises(spin_jax.UserError, match="out.jsonl.parts holds responses of another") as refused:
            spin_jax.answer(model, prompts, out, SETTINGS | changes)
        return str(refused.value)

    assert 'another "seed": delete it, or go on as' in refusal(seed=7)
    assert 'another "generate.temperature":' in refusal(**{"generate.temperature": 0.5})
    fewer = tiny_files.write_jsonl(tmp_path / "fewer.jsonl", tiny_files.make_rows()[1:])
    assert "another list of prompts:" in refusal(fewer)
    weights = model / "model.safetensors"
    whole_weights = weights.read_bytes()
    weights.write_bytes(whole_weights[:-1] + bytes([whole_weights[-1] ^ 1]))  # as large as before
    assert "another model (weights):" in refusal()
    weights.write_bytes(whole_weights)  # at another time than before, which matters to nobody
    after = {path.name: (path.read_text(), path.stat().st_mtime_ns) for path in parts.glob("[ps]*")}
    assert after == before

    resumed = run(*flags(model, prompts, out))
    assert resumed.returncode == 0, resumed.stderr
    assert "24 answers" in resumed.stderr
    assert same(read(out), read(whole)) and not parts.exists()


def test_two_processes_answer_as_one(tiny_model, prompts, tmp_path):
    out, address = tmp_path / "out.jsonl", f"127.0.0.1:{free_port()}"
    joined = "from spin_jax.runtime import multihost; multihost.start({!r}, 2, {})\n"
    commands = [["-c", joined.format(address, i) + COMMAND, *flags(tiny_model, prompts, out)] for i in range(2)]
    ended = run_together(commands, devices=4)
    assert [process.status for process in ended] == [0, 0], ended[0].output + ended[1].output
    assert "24 answers" in ended[0].output and "24 answers" not in ended[1].output
    (alone,) = run_together([["-c", COMMAND, *flags(tiny_model, prompts, tmp_path / "alone.jsonl")]], devices=8)
    assert alone.status == 0, alone.output
    assert same(read(out), read(tmp_path / "alone.jsonl"))
    assert sorted(os.listdir(tmp_path)) == ["alone.jsonl", "out.jsonl"]


def test_the_docstrings_example_runs(tiny_model, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("my-sft-model").symlink_to(tiny_model)
    pathlib.Path("my-prompts.jsonl").symlink_to(prompts)
    (example,) = doctest.DocTestFinder().find(spin_jax.answer, globs={"spin_jax": spin_jax, "json": json})
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


# ---- mistakes


def refused(tiny_model, prompts, out, **changes) -> str:
    with pytest.raises(spin_jax.UserError) as error:
        spin_jax.answer(tiny_model, prompts, out, SETTINGS | changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_that_is_there_is_never_overwritten(tiny_model, prompts, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    assert "out.jsonl is there already: delete it" in refused(tiny_model, prompts, tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == ["out.jsonl"] and (tmp_path / "out.jsonl").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_found_before_sampling(tiny_model, prompts):
    message = refused(tiny_model, prompts, prompts / "out.jsonl")
    assert "prompts.jsonl/out.jsonl.parts" in message and "cannot be written: Not a directory" in message


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "prompts.jsonl: there are no rows"),
        ([{"prompt": "a"}, {"prompt": " "}], {}, "prompts.jsonl:2: empty prompt"),
        (
            [{"prompt": "a"}, {"prompt": "b" * 50}],
            {"data.long_prompts": "skip"},
            '1 of 2 prompts are longer than "data.max_prompt_length": 48, the first in row 1: raise it',
        ),
        (
            [{"prompt": "a"}, *[{"messages": [{"role": role, "content": "a"} for role in ("system", "user")]}] * 2],
            {"data.template": "paper"},
            "prompts.jsonl row 1, 2: the paper's templates take one user turn",
        ),
        ([{"prompt": "a"}], {"generate.batch_size": 9}, '"generate.batch_size": 9 does not split over'),
        ([{"prompt": "a"}], {"generate.tempature": 1}, 'did you mean "generate.temperature"?'),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(tiny_model, tmp_path, rows, changes, message):
    prompts = tiny_files.write_jsonl(tmp_path / "prompts.jsonl", rows)
    assert message in refused(tiny_model, prompts, tmp_path / "out.jsonl", **changes)
    assert os.listdir(tmp_path) == ["prompts.jsonl"]


def test_a_long_prompt_is_asked_without_its_beginning(tiny_model, tmp_path, caplog):
    rows = [{"prompt": "x" * length + "a" * 44} for length in (10, 20)]
    prompts = tiny_files.write_jsonl(tmp_path / "prompts.jsonl", rows)
    with caplog.at_level("WARNING", "spin_jax"):
        spin_jax.answer(tiny_model, prompts, tmp_path / "out", tiny_files.SETTINGS | {"generate.temperature": 0.0})
    assert "2 of 2 prompts are longer than --config.data.max_prompt_length=48 and asked without their" in caplog.text
    assert len({row["response"] for row in read(tmp_path / "out")}) == 1
    assert [row["prompt"] for row in read(tmp_path / "out")] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        ("--config", [], "--config is missing: python -m spin_jax.generate --prompts="),
        ("--prompts", [], "--prompts is missing"),
        ("--out", [], "--out is missing"),
        ("none", ["--config.model.path=toy:"], '--config.model.path="toy:" is made by a run'),
        ("none", ["--config.generate.top_p=2.0"], "--config.generate.top_p=2.0 must be at most 1"),
        ("none", ["prompts.jsonl"], "'prompts.jsonl' is not a flag"),
        ("none", ["--prompts=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else value,
)
def test_a_mistake_in_the_command_is_one_line(dropped, added, message, tiny_model, prompts, tmp_path):
    arguments = [flag for flag in flags(tiny_model, prompts, tmp_path / "out") if not flag.startswith(dropped)]
    result = run(*arguments, *added)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"spin_jax: {message}") and result.stderr.count("\n") == 1, result.stderr


def test_help_says_what_it_does():
    result = run("--help")
    assert "--prompts=FILE --out=FILE" in result.stdout and "--out:" in result.stdout
