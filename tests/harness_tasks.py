"""Tasks of the lm-evaluation-harness on local data, a few questions each, and what a model says to every request."""

import hashlib
import json
import pathlib
import subprocess
import sys
from typing import Any

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

# Multiple choice in its kinds: letters or texts as answers, several right ones, one ending of two questions.
CHOICES = ("arc_challenge_local", "hellaswag_local", "truthfulqa_mc2_local", "winogrande_local")
TEXTS = "gsm8k_texts"  # whole texts, loglikelihood_rolling
ANSWERS = "gsm8k_local"  # with several stop strings
TASKS = (*CHOICES, TEXTS, ANSWERS)


def write_tasks(assets: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """The files of TASKS."""
    script = [sys.executable, assets / "lm_eval/make_tasks.py", "--data", assets / "data", "--out", directory]
    subprocess.run(script, check=True, capture_output=True, timeout=120)
    rows = {"data_files": {"test": str(assets / "data/gsm8k/test.jsonl")}}
    task = {"task": TEXTS, "dataset_path": "json", "dataset_kwargs": rows, "test_split": "test"}
    task |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    task["metric_list"] = [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    (directory / f"{TEXTS}.yaml").write_text(yaml.safe_dump(task))
    return directory


def ask(model: Any, directory: pathlib.Path, tasks: tuple[str, ...] = TASKS, **options) -> dict[str, dict]:
    """Task -> its scores, its requests' hash and the model's answers: [log-prob, greedy], log-prob or text."""
    results: Any = lm_eval.simple_evaluate(
        model,
        tasks=list(tasks),
        num_fewshot=1,
        limit=4,
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 24},
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        **options,
    )
    found = {}
    for task in tasks:
        samples = {one["doc_id"]: one for one in results["samples"][task]}.values()  # once, of several filters
        asked = json.dumps([one["arguments"] for one in samples])
        scores = {name: x for name, x in results["results"][task].items() if isinstance(x, float)}
        answers = [list(said) if isinstance(said, tuple) else said for one in samples for (said,) in one["resps"]]
        found[task] = {"requests": hashlib.sha256(asked.encode()).hexdigest(), "scores": scores, "answers": answers}
    return found


def check_same(found: dict[str, dict], expected: dict[str, dict]) -> None:
    """Log-probs within 1e-3 nats; requests, greedy flags and texts equal, scores but for what log-probs move."""
    assert found.keys() == expected.keys()
    for task, ours in found.items():
        theirs = expected[task]
        assert ours["requests"] == theirs["requests"], f"{task}: other requests: another lm_eval, or other data"
        for number, (one, other) in enumerate(zip(ours["answers"], theirs["answers"], strict=True)):
            where = f"{task}, request {number}: {one}, not {other}"
            if isinstance(other, str):
                assert one == other, where
            else:
                (logp, *greedy), (their_logp, *their_greedy) = (x if isinstance(x, list) else [x] for x in (one, other))
                assert abs(logp - their_logp) < 1e-3 and greedy == their_greedy, where
        assert ours["scores"].keys() == theirs["scores"].keys()
        for name, score in ours["scores"].items():
            assert abs(score - theirs["scores"][name]) <= 1e-4 * abs(theirs["scores"][name]), f"{task} {name}"
