"""What an evaluator can do with a model of a run: sample from it, score with it, keep files, answer MT-Bench."""

import json
import pathlib

import numpy as np
import pytest
import tiny_files

import spin_jax
from spin_jax.config import replace
from spin_jax.data.pairs import Pair
from spin_jax.data.sources import Example
from spin_jax.errors import UserError
from spin_jax.evaluation import EVALUATORS, lm_eval
from spin_jax.evaluation.interface import Evaluator, Subject
from spin_jax.evaluation.loaded_model import load_model
from spin_jax.evaluation.mt_bench import SAMPLING
from spin_jax.evaluation.mt_bench_answers import answer_alone
from spin_jax.reports.record import RunRecord
from spin_jax.reports.task_scores import TaskScores


def greedy(subject: Subject) -> dict[str, float]:
    """Greedy responses to the held-out prompts: how long they are, and how likely by the engine and by the scorer."""
    prompts = [pair.prompt for pair in subject.held_out]
    responses = subject.generate(prompts, temperature=0.0, max_new_tokens=5)
    pairs = [
        Pair(row, -1, prompt, (response.tokens, response.tokens[:1]), (response.truncated, True))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    logps = subject.logprobs(pairs, "greedy, scored")
    sampled = [(float(response.logprobs.sum()), float(response.logprobs[0])) for response in responses]
    np.testing.assert_allclose(logps, sampled, rtol=1e-4, atol=1e-4)
    (subject.directory / "greedy.txt").write_text("\n".join(subject.chat.codec.decode(y.tokens) for y in responses))
    examples = [Example(0, ({"role": "user", "content": "abc"},), "cba")]
    (encoded,) = subject.encode(examples)
    assert subject.chat.codec.decode(encoded.responses[0]) == "cba"
    longest = max(len(response.tokens) for response in responses)
    return {"greedy/logp": float(np.mean(logps[:, 0])), "greedy/longest": longest}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> pathlib.Path:
    """Questions of three temperatures, laid out as FastChat's."""
    turns = {
        "math": ["1+1?", "And 2+2?"],
        "writing": ["Write.", "Again."],
        "stem": ["Why?", "How?"],
        "coding": ["f?", "g?"],
    }
    rows = [{"question_id": 81 + i, "category": name, "turns": turns[name]} for i, name in enumerate(turns)]
    directory = tmp_path_factory.mktemp("bench")
    (directory / "mt_bench").mkdir()
    tiny_files.write_jsonl(directory / "mt_bench/question.jsonl", rows)
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> pathlib.Path:
    """A task of the lm-evaluation-harness."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{i}+1=", "choices": ["a", "bc"], "label": i % 2} for i in range(6)]
    rows = str(tiny_files.write_jsonl(directory / "rows.jsonl", rows))
    task = {"task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": rows}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    task |= {"doc_to_target": "label", "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}]}
    (directory / "sums.yaml").write_text(json.dumps(task))
    return directory


def answers_in(directory: pathlib.Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"model_answer/{name}.jsonl").read_text().splitlines()]


def test_an_evaluator_samples_scores_and_keeps_files(tiny_model, tmp_path, own_registries, bench, tasks):
    """Of the model that a run starts from, and of the one that it makes; its numbers are in the summary. Answers to
    MT-Bench are FastChat's lines, and those that the model gives outside of a run; the second turn comes after the
    first. A task's scores are those that the exported model has outside of the run."""
    EVALUATORS.register("greedy", Evaluator(greedy))
    settings = {"iterations": 1, "evaluate.evaluators": ("greedy", "mt_bench", "lm_eval")}
    settings |= {"evaluate.tasks": ("sums:1",), "evaluate.include_path": str(tasks)}
    settings |= {"evaluate.mt_bench": str(bench), "evaluate.mt_bench_tokens": 12}
    spin_jax.spin(spin_jax.load(tiny_model), tiny_files.make_rows(), tmp_path, tiny_files.SETTINGS | settings)
    start, policy = RunRecord.load(tmp_path).results
    assert start["model"] == "SFT" and policy["model"] == "iteration 0" and policy["iteration"] == 0
    for row, directory in ((start, tmp_path), (policy, tmp_path / "iteration_0")):
        assert row["greedy/logp"] < 0 and 1 <= row["greedy/longest"] <= 5
        assert not any(name.startswith("held_out") for name in row), "the one evaluator that was named"
        assert len((directory / "greedy.txt").read_text().splitlines()) >= 1
    assert start["greedy/logp"] != policy["greedy/logp"]
    assert "greedy" in (tmp_path / "summary.txt").read_text()

    config = tiny_files.make_config(tiny_model, tmp_path, {name: settings[name] for name in settings if "task" in name})
    config = replace(config, {"evaluate.include_path": str(tasks)})
    lm_eval.evaluate(config, [str(tmp_path / "iteration_0/model")], tmp_path / "asked")
    (alone,) = (TaskScores.read(path.parent, "sums") for path in (tmp_path / "asked").glob("*/sums.json"))
    kept = TaskScores.read(tmp_path / "iteration_0/lm_eval", "sums")
    assert kept.questions == alone.questions and kept.key == alone.key
    assert policy["sums/acc"] == kept.values["acc"] and policy["sums/acc_stderr"] == kept.errors["acc"]
    lines = (tmp_path / "scores.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["tasks", lines[1].split()[0], "SFT", "iteration", "less"]

    assert 1 <= start["mt_bench/tokens"] <= 12 and 0 <= policy["mt_bench/truncated"] <= 1
    rows = answers_in(tmp_path, "SFT")
    for i, row in enumerate(rows):
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]  # of gen_model_answer.py
        assert (row["question_id"], row["model_id"]) == (81 + i, "SFT") and isinstance(row["tstamp"], float)
        assert [(one["index"], len(one["turns"])) for one in row["choices"]] == [(0, 2)]
    assert len({row["answer_id"] for row in rows}) == 4
    trained = answers_in(tmp_path / "iteration_0", "iteration_0")
    assert [row["choices"] for row in trained] != [row["choices"] for row in rows]

    config = tiny_files.make_config(tiny_model, pathlib.Path("not read"))
    config = replace(config, {"evaluate.mt_bench": str(bench), "evaluate.mt_bench_tokens": 12})
    answer_alone(config, tmp_path / "alone", "tiny")
    assert [row["choices"] for row in answers_in(tmp_path / "alone", "tiny")] == [row["choices"] for row in rows]
    with pytest.raises(UserError, match="tiny.jsonl is there already: delete it, or give another --model_id"):
        answer_alone(config, tmp_path / "alone", "tiny")

    loaded, (first, second) = load_model(config), rows[0]["choices"][0]["turns"]
    texts = ["u:1+1?</s>a:", f"u:1+1?</s>a:{first}</s>u:And 2+2?</s>a:"]  # in the tiny model's template
    prompts = {i: loaded.tokenizer(text, add_special_tokens=False).input_ids for i, text in enumerate(texts)}
    drawn = loaded.sample(prompts, **SAMPLING | {"temperature": 0.0, "max_new_tokens": 12})
    said = [loaded.tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in drawn]
    assert said == [first, second]
