"""Scores of tasks: kept, compared question by question, and in the paper's tables."""

import dataclasses
import json
import math

import numpy as np
import pytest

from spin_jax.reports.paper_tables import SUITES
from spin_jax.reports.scores import score_tables, scores
from spin_jax.reports.summary import summary_table
from spin_jax.reports.task_scores import TaskScores, difference, read_all

RIGHT = [1, 0, 1, 1, 0, 1, 0, 1]
BETTER = [1, 1, 1, 0, 1, 1, 0, 1]  # two questions more, one less


def of_task(task: str, questions: list[float], shots: int | None = None, metric: str = "acc", **key) -> TaskScores:
    mean, n = float(np.mean(questions)), len(questions)
    error = float(np.std(questions, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return TaskScores(
        task, shots, {"shots": shots, **key}, {metric: mean}, {metric: error}, {metric: questions}, [], {}
    )


def test_what_is_kept_is_read(tmp_path):
    kept = of_task("arc_challenge", RIGHT, 25, "acc_norm", model={"weights": "a"})
    kept.write(tmp_path)
    assert read_all(tmp_path) == {"arc_challenge": kept}
    (tmp_path / "arc_challenge.json").write_text('{"task": ')
    assert read_all(tmp_path) == {} == read_all(tmp_path / "nowhere")


def test_models_are_compared_question_by_question():
    """Two questions won, one lost, of eight: McNemar's variance of the difference is (3 - 1/8) / 8 / 7."""
    mean, error = difference(of_task("a", BETTER, model=1), of_task("a", RIGHT, model=2), "acc")
    assert mean == 1 / 8
    np.testing.assert_allclose(error, math.sqrt((3 - 1 / 8) / 8 / 7), rtol=1e-12)
    assert difference(of_task("a", RIGHT), of_task("a", RIGHT), "acc") == (0, 0)
    assert difference(of_task("a", RIGHT), of_task("a", RIGHT, shots=5), "acc") is None, "not asked the same"
    assert difference(of_task("a", RIGHT), of_task("a", RIGHT[:7]), "acc") is None
    assert difference(of_task("a", RIGHT), of_task("a", RIGHT), "acc_norm") is None
    assert math.isnan(difference(of_task("a", [1]), of_task("a", [0]), "acc")[1])


def test_a_paired_error_is_that_of_the_bootstrap():
    random = np.random.default_rng(0)
    base = random.random(400) < 0.5
    ours = np.where(random.random(400) < 0.8, base, random.random(400) < 0.7)
    _, error = difference(of_task("a", ours.astype(float).tolist()), of_task("a", base.astype(float).tolist()), "acc")
    d = ours.astype(float) - base
    drawn = d[random.integers(0, 400, (4000, 400))].mean(1).std()
    separate = math.hypot(ours.std(), base.std()) / math.sqrt(400)
    assert error == pytest.approx(drawn, rel=0.05) and error < 0.6 * separate


def all_of(suite: str, questions: list[float]) -> dict[str, TaskScores]:
    return {one.task: of_task(one.task, questions, one.shots, one.metric) for one in SUITES[suite].columns}


def test_the_papers_table():
    lines = score_tables({"SFT": all_of("open_llm", RIGHT), "iteration 0": all_of("open_llm", BETTER)}).splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    headings = ["ARC (25)", "TruthfulQA (0)", "Winogrande (5)", "GSM8K (5)", "HellaSwag (10)", "MMLU (5)"]
    assert cells[0] == ["open_llm", *headings, "average"]
    error = 100 * np.std(RIGHT, ddof=1) / math.sqrt(8)
    assert cells[2] == ["SFT", *[f"62.50 ±{error:.2f}"] * 6, f"62.50 ±{error / math.sqrt(6):.2f}"]
    paired = 100 * math.sqrt((3 - 1 / 8) / 8 / 7)
    assert cells[4] == ["less SFT", *[f"+12.50 ±{paired:.2f}"] * 6, f"+12.50 ±{paired / math.sqrt(6):.2f}"]
    assert "paper: zephyr-7b-sft-full  60.41 43.73 74.19 26.76 82.85 60.92 58.14".split() == lines[5].split()
    assert lines[9].split()[-7:] == "65.87 54.90 73.72 38.97 85.54 59.99 63.16".split()


def test_averages_of_the_paper_are_those_of_its_columns():
    """As the paper prints them, for the rows that it has them for; but for its own rounding."""
    printed = (58.14, 60.80, 62.12, 62.97, 63.16, 61.31, 57.23)
    for row, average in zip(SUITES["open_llm"].rows.values(), printed, strict=True):
        assert np.mean(row) == pytest.approx(average, abs=0.0051)


def test_scores_that_are_missing_or_of_other_shots_are_dashes():
    some = {"gsm8k": of_task("gsm8k", RIGHT, 5, "exact_match,strict-match")}
    some |= {"arc_challenge": of_task("arc_challenge", RIGHT, 3, "acc_norm")}
    suite, own = score_tables({"SFT": some, "iteration 0": {}}).split("\n\n")
    assert suite.splitlines()[2].split()[:4] == ["SFT", "-", "-", "-"] and suite.splitlines()[2].split()[-1] == "-"
    assert own.splitlines()[0].split() == ["tasks", "arc_challenge", "acc_norm", "(3)"]
    assert own.splitlines()[2].split() == ["SFT", "0.6250", "±0.1830"]


def test_a_run_without_tasks_has_no_table(tmp_path):
    from spin_jax.reports.record import RunRecord

    (tmp_path / "result.json").write_text(json.dumps({"model": "SFT", "iteration": None}))
    assert scores(RunRecord.load(tmp_path)) == {}
    of_task("own", RIGHT).write(tmp_path / "lm_eval")
    assert scores(RunRecord.load(tmp_path))["scores.txt"].splitlines()[2].split() == ["SFT", "0.6250", "±0.1830"]


def test_a_key_of_other_questions_is_told():
    ours = of_task("a", RIGHT, limit=8)
    assert difference(ours, dataclasses.replace(ours, key={**ours.key, "limit": 9}), "acc") is None


def test_the_summary_has_errors_beside_values():
    rows = [{"model": "SFT", "a/acc": 0.5, "a/acc_stderr": 0.01234, "n": 3}, {"model": "it", "a/acc": 0.25, "n": 4}]
    lines = summary_table(rows).splitlines()
    assert lines[-2:] == ["SFT    0.5000 ±0.0123  3", "it             0.2500  4"]
    assert "stderr" not in summary_table(rows)
