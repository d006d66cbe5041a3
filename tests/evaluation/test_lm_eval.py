"""Whole tasks of the harness: which ones are asked, of what data, and what is kept of the answers."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_files

from spin_jax.config import EvaluateConfig, replace
from spin_jax.errors import UserError
from spin_jax.reports.paper_tables import SUITES

pytest.importorskip("lm_eval.tasks", reason="the harness is missing: pip install 'spin_jax[eval]'")

from spin_jax.evaluation import lm_eval  # noqa: E402

ROWS = [{"question": f"{i}+1=", "choices": ["a", "bc"], "label": i % 2} for i in range(6)]
CHOICES = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "label"}
CHOICES |= {"doc_to_choice": "choices", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of tasks: `sums`, whose data lie in `data/`, `lost`, whose data nobody has, and a group of two."""
    directory = tmp_path_factory.mktemp("tasks")
    for name, path in {"sums": "own/sums", "more": "own/sums", "lost": "nobody/nothing"}.items():
        task = {"task": name, "dataset_path": path, "test_split": "test", **CHOICES}
        (directory / f"{name}.yaml").write_text(json.dumps(task))
    mean = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (directory / "both.yaml").write_text(json.dumps({"group": "both", "task": ["sums", "more"], **mean}))
    (directory / "data/own/sums").mkdir(parents=True)
    tiny_files.write_jsonl(directory / "data/own/sums/test.jsonl", ROWS)
    return directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def settings_of(tasks, *names: str, **fields) -> EvaluateConfig:
    return EvaluateConfig(include_path=str(tasks), data_dir=str(tasks / "data"), tasks=names, **fields)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one architecture."""
    return [tiny_files.write_model(tmp_path_factory.mktemp("tiny"), seed=seed) for seed in (0, 1)]


def test_one_command(models, tasks, tmp_path):
    """Two models are asked, compared question by question, and not asked again."""
    asked = settings_of(tasks, "sums:1", limit=5.0)
    flags = [f"--model={models[0]},{models[1]}", "--tasks=sums", "--num_fewshot=1", "--limit=5"]
    flags += [f"--include_path={tasks}", f"--data_dir={tasks / 'data'}", f"--out={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "spin_jax.evaluate", *flags, "--config.model.compute_dtype=float32"]
    environment = os.environ | {"XLA_FLAGS": "", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr
    files = [tmp_path / "out" / str(model).strip("/").replace("/", "__") / "sums.json" for model in models]
    kept = [json.loads(file.read_text()) for file in files]
    first, second = (one["questions"]["acc"] for one in kept)
    assert [one["values"]["acc"] for one in kept] == [np.mean(first), np.mean(second)] and len(first) == 5
    assert kept[0]["key"]["dtype"] == "float32" and kept[0]["shots"] == 1
    assert kept[0]["key"]["model"]["weights"] != kept[1]["key"]["model"]["weights"]
    table = ran.stdout.splitlines()
    assert table[0].split() == ["tasks", "sums", "acc", "(1)"] and f"{np.mean(first):.4f}" in table[2]
    assert f"{np.mean(second) - np.mean(first):+.4f}" in table[4]
    files[1].write_text(files[1].read_text().replace(f'"acc": {np.mean(second)}', '"acc": 0.125'))
    config = tiny_files.make_config(models[0], tmp_path)
    config = replace(config, {f"evaluate.{name}": value for name, value in vars(asked).items()})
    assert "0.1250" in lm_eval.evaluate(config, list(map(str, models)), tmp_path / "out"), "not asked again"


def test_scores_are_those_of_the_log_probs(models, tasks, tmp_path):
    """Of a task, and of a group, whose questions are those of its tasks together."""
    from lm_eval.api.instance import Instance

    from spin_jax.evaluation.harness import HarnessModel
    from spin_jax.evaluation.loaded_model import load_model

    model = HarnessModel(load_model(tiny_files.make_config(models[0], tmp_path)))
    asked = [(row["question"], choice) for row in ROWS for choice in row["choices"]]
    logps = model.loglikelihood(
        [Instance("loglikelihood", {}, one, i, metadata=("sums", i, 1)) for i, one in enumerate(asked)]
    )
    right = np.argmax(np.reshape([logp for logp, _ in logps], (6, 2)), axis=1) == [row["label"] for row in ROWS]
    found = lm_eval.ask_all(model, settings_of(tasks, "both"), tmp_path, {"weights": "a"})
    assert found["both"].questions["acc"] == [*right, *right] and found["both"].values["acc"] == right.mean()
    assert found["both"].harness["results"]["more"]["acc,none"] == right.mean()
    (alone,) = lm_eval.ask_all(model, settings_of(tasks, "sums", limit=2.0), tmp_path, {"weights": "a"}).values()
    assert alone.questions["acc"] == [*right[:2]]
    before = (tmp_path / "sums.json").read_text()
    lm_eval.ask_all(model, settings_of(tasks, "sums", limit=3.0), tmp_path, {"weights": "a"})
    assert (tmp_path / "sums.json").read_text() != before, "other questions are asked anew"


def test_shots_and_suites():
    wanted = list(lm_eval._wanted(("open_llm", "sums:0", "mmlu_*")))
    assert wanted[0] == ("arc_challenge", 25, ("acc_norm",)) and wanted[3][2] == ("exact_match,strict-match",)
    assert len(wanted) == 8 and wanted[6:] == [("sums", 0, None), ("mmlu_*", None, None)]


def test_suites_have_the_harness_names(tasks):
    """Tasks, and metrics that they have."""
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = lm_eval._read_tasks(str(tasks), include_defaults=True)
    for suite in SUITES.values():
        assert all(len(row) == len(suite.columns) for row in suite.rows.values())
        for column in suite.columns:
            task = load_yaml(manager.task_index[column.task].yaml_path, resolve_func=False)
            metric, _, kept = column.metric.partition(",")
            named = task.get("metric_list") or task["aggregate_metric_list"]
            assert metric in [one["metric"] for one in named], column
            assert not kept or kept in [one["name"] for one in task["filter_list"]], column


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["summs"], "summs is no task of the harness, nor of --config.evaluate.include_path: did you mean sums?"),
        (["sums:x"], "write 'sums:x' as 'task:shots', such as 'arc_challenge:25'"),
        (["lost"], "task lost cannot be loaded (Couldn't reach 'nobody/nothing' on the Hub"),
    ],
)
def test_tasks_that_cannot_be_asked(tasks, names, message, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=re.escape(message)):
        lm_eval.load_tasks(settings_of(tasks, *names))


def test_data_that_are_not_there(tasks):
    with pytest.raises(UserError, match="--config.evaluate.data_dir=nowhere is not a directory"):
        lm_eval.load_tasks(EvaluateConfig(include_path=str(tasks), tasks=("sums",), data_dir="nowhere"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=x", "--tasks=arc_challenge"], "--out is missing: python -m spin_jax.evaluate --model=x"),
        (["--model=x", "--out=y"], "--tasks and --suite are missing: add --suite=open_llm, or a task"),
        (["--model=x", "--out=y", "--tasks=a", "--suite=open_llm"], "--suite and --tasks: give one of them"),
        (["--model=x", "--tasks=a", "--out=y", "--fewshot_as_multiturn"], "needs a chat: add --apply_chat_template"),
    ],
)
def test_mistakes_of_one_line(flags, message):
    command = [sys.executable, "-m", "spin_jax.evaluate", *flags]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and message in ran.stderr.splitlines()[-1], ran.stderr


def test_without_the_extra(tasks, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install 'spin_jax\\[eval\\]'"):
        lm_eval.load_tasks(settings_of(tasks, "sums", limit=1.0))
