"""The tables of the SPIN paper (arXiv 2401.01335): which tasks a suite asks, and the paper's rows beside ours.

Tasks and metrics have today's names in the lm-evaluation-harness. The paper used its commit 46c7966 (version 0.4.0),
which has the same task names; GSM8K's `exact_match` had one filter there, `get-answer`, which is `strict-match` today.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Column:
    """A task of a table.

    Attributes:
        heading: the paper's name of it.
        task: the harness's name.
        shots: examples before each question; None is the task's own number.
        metric: of the task's scores; with ",filter" where the harness filters answers.
    """

    heading: str
    task: str
    shots: int | None
    metric: str


@dataclasses.dataclass(frozen=True)
class Suite:
    """A table of the paper.

    Attributes:
        columns: in the paper's order.
        source: where its rows are.
        rows: model -> its scores in the columns, in percent.
        has_average: whether the table ends with the mean of its columns.
    """

    columns: tuple[Column, ...]
    source: str
    rows: Mapping[str, tuple[float, ...]]
    has_average: bool


SUITES = {
    "open_llm": Suite(
        (
            Column("ARC", "arc_challenge", 25, "acc_norm"),
            Column("TruthfulQA", "truthfulqa_mc2", 0, "acc"),
            Column("Winogrande", "winogrande", 5, "acc"),
            Column("GSM8K", "gsm8k", 5, "exact_match,strict-match"),
            Column("HellaSwag", "hellaswag", 10, "acc_norm"),
            Column("MMLU", "mmlu", 5, "acc"),
        ),
        "tables 3 and 4 of the paper's version 3",
        {
            "zephyr-7b-sft-full": (60.41, 43.73, 74.19, 26.76, 82.85, 60.92),
            "SPIN iteration 0": (63.40, 49.18, 72.69, 35.10, 84.38, 60.03),
            "SPIN iteration 1": (65.19, 55.17, 72.30, 35.78, 84.96, 59.34),
            "SPIN iteration 2": (65.96, 54.91, 73.56, 38.06, 85.41, 59.93),
            "SPIN iteration 3": (65.87, 54.90, 73.72, 38.97, 85.54, 59.99),
            "zephyr-7b-dpo-full": (63.65, 55.19, 72.61, 33.43, 84.44, 58.52),
            "SFT, one more epoch": (57.76, 44.39, 75.77, 25.85, 81.69, 57.89),
        },
        has_average=True,
    ),
    "paper_bbh": Suite(
        (
            Column("causal judgement", "bbh_cot_fewshot_causal_judgement", None, "exact_match,get-answer"),
            Column("formal fallacies", "bbh_cot_fewshot_formal_fallacies", None, "exact_match,get-answer"),
            Column("sports", "bbh_cot_fewshot_sports_understanding", None, "exact_match,get-answer"),
            Column("OpenBookQA", "openbookqa", 1, "acc_norm"),
        ),
        "table 6 of the paper's version 3",
        {
            "zephyr-7b-sft-full": (56.15, 49.6, 96.0, 45.4),
            "SPIN iteration 0": (57.75, 51.6, 95.2, 46.8),
            "SPIN iteration 1": (58.82, 51.2, 95.2, 47.2),
            "SPIN iteration 2": (59.36, 51.2, 94.4, 47.6),
        },
        has_average=False,
    ),
}
