"""Tables of task scores, as the paper prints them: its rows beside ours, with standard errors."""

import math
from collections.abc import Mapping, Sequence

from spin_jax.reports.paper_tables import SUITES, Column, Suite
from spin_jax.reports.record import RunRecord
from spin_jax.reports.task_scores import DIRECTORY, TaskScores, difference, read_all

Models = Mapping[str, Mapping[str, TaskScores]]  # a model's name -> task -> its scores
_Cell = tuple[float, float] | None  # a score and its standard error


def scores(record: RunRecord) -> dict[str, str]:
    """`scores.txt`, where models of the run were asked tasks."""
    found = {name: read_all(directory / DIRECTORY) for name, directory in record.directories.items()}
    tables = score_tables({name: of_model for name, of_model in found.items() if of_model})
    return {"scores.txt": tables + "\n"} if tables else {}


def score_tables(models: Models) -> str:
    """A table in percent for each suite of which a model has a score, and one for all other tasks, of the harness's own
    numbers. The first model is what the others are compared with, question by question."""
    asked = {task for of_model in models.values() for task in of_model}
    tables = []
    for name, suite in SUITES.items():
        if any(_has(models, column) for column in suite.columns):
            tables.append(_table(name, suite, models))
            asked -= {column.task for column in suite.columns if _has(models, column)}
    if asked:
        tables.append(_table("tasks", Suite(tuple(_columns(models, asked)), "", {}, has_average=False), models))
    return "\n\n".join(tables)


def _has(models: Models, column: Column) -> bool:
    """Whether a model was asked a task as the column asks it."""
    of_task = (of_model[column.task] for of_model in models.values() if column.task in of_model)
    return any(one.shots == column.shots and column.metric in one.values for one in of_task)


def _columns(models: Models, tasks: set[str]) -> list[Column]:
    """A column for each metric of each task."""
    found = {}
    for of_model in models.values():
        for task in sorted(tasks & of_model.keys()):
            one = of_model[task]
            found |= {(task, name): Column(f"{task} {name}", task, one.shots, name) for name in one.values}
    return list(found.values())


def _table(name: str, suite: Suite, models: Models) -> str:
    first = next(iter(models))
    lines = [[name, *map(_heading, suite.columns)] + ["average"] * suite.has_average]
    scale = 100 if suite.rows else 1
    for model, of_model in models.items():
        lines.append([model, *_cells([_score(of_model, column) for column in suite.columns], suite, scale)])
        if model != first:
            compared = [_difference(of_model, models[first], column) for column in suite.columns]
            lines.append([f"  less {first}", *_cells(compared, suite, scale, "+")])
    for model, row in suite.rows.items():
        lines.append([f"paper: {model}", *_cells([(value, math.nan) for value in row], suite)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([texts[0], "  ".join("-" * width for width in widths), *texts[1:]])


def _heading(column: Column) -> str:
    return column.heading if column.shots is None else f"{column.heading} ({column.shots})"


def _score(of_model: Mapping[str, TaskScores], column: Column) -> _Cell:
    one = of_model.get(column.task)
    if one is None or one.shots != column.shots or column.metric not in one.values:
        return None
    return one.values[column.metric], one.errors.get(column.metric, math.nan)


def _difference(ours: Mapping[str, TaskScores], theirs: Mapping[str, TaskScores], column: Column) -> _Cell:
    if _score(ours, column) is None or _score(theirs, column) is None:
        return None
    return difference(ours[column.task], theirs[column.task], column.metric)


def _cells(row: Sequence[_Cell], suite: Suite, scale: float = 1, sign: str = "") -> list[str]:
    """The texts of a row, with the mean of its columns where the table has one. Tasks are independent: the error of
    their mean is the root of their squared errors' sum, over their number."""
    digits = 2 if suite.rows else 4
    row = [one and (scale * one[0], scale * one[1]) for one in row]
    cells = [_cell(one, digits, sign) for one in row]
    if suite.has_average:
        whole = [one for one in row if one]
        mean = sum(value for value, _ in whole) / len(row), math.hypot(*(error for _, error in whole)) / len(row)
        cells.append(_cell(mean if len(whole) == len(row) else None, digits, sign))
    return cells


def _cell(score: _Cell, digits: int, sign: str) -> str:
    if score is None:
        return "-"
    value, error = score
    return f"{value:{sign}.{digits}f}" + ("" if math.isnan(error) else f" ±{error:.{digits}f}")
