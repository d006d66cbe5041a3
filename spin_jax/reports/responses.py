"""Responses to read and to count: answers to the held-out prompts beside each other, rewards and lengths of pairs."""

from collections import defaultdict
from typing import Any

import numpy as np

from spin_jax.reports.record import CONTROL, ITERATION, RunRecord

PROMPTS = 300  # on a page: more than anybody reads, and some MB at most, where a run may have 50,000
CHARACTERS = 4000  # of a text on a page
PAIRS, REWARDS, SAMPLES = "generated/pairs.parquet", "rewards.jsonl", "samples.jsonl"


def prompts(record: RunRecord, most: int = PROMPTS) -> dict[str, Any]:
    """What the page's browser of prompts shows of a run: `total` prompts, of which `rows` are shown, each with its
    `row`, `prompt` (role and content of each turn), `real` response, `answers` (whose, the text, whether truncated) and
    `margins` (iteration, margin).

    Of more than `most` prompts a third are those with the smallest margin in the last iteration that knows margins, a
    third those with the largest, and the others lie evenly between them. Without held-out prompts they are of the pairs
    to train on.
    """
    found = _answers(record) or _pairs(record, most)
    last: dict[int, float] = {}
    for t, of_row in _margins(record).items():
        for row, margin in of_row.items():
            if row in found:
                found[row]["margins"].append([t, margin])
        last = of_row or last
    rows = sorted(found, key=lambda row: (last.get(row, 0.0), row))
    third = most // 3
    if len(rows) > most:
        between = rows[third : len(rows) - third]
        rows = rows[:third] + [between[i] for i in _spread(len(between), most - 2 * third)] + rows[len(rows) - third :]
    return {"total": len(found), "rows": [found[row] for row in sorted(rows)]}


def _spread(count: int, most: int) -> np.ndarray:
    """So many places of `count`, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _answers(record: RunRecord) -> dict[int, dict]:
    """Of each `samples.jsonl`, controls last. The opponent of an iteration is the policy before it; it stands by itself
    only where it has answered something else."""
    found: dict[int, dict] = {}
    directories = record.directories
    for name in sorted(directories, key=lambda name: name.startswith(CONTROL)):
        for line in filter(_is_sample, record.lines(directories[name] / SAMPLES)):
            entry = found.setdefault(line["row"], _entry(line["row"], line["prompt"], line["real"]))
            answers, opponent = entry["answers"], _cut(line["opponent"])
            if name.startswith(ITERATION):
                if answers and answers[-1][1] == opponent:
                    answers[-1][0] += f", opponent of {name}"
                else:
                    answers.append([f"opponent of {name}", opponent, False])
            answers.append([name, _cut(line["policy"]), line.get("truncated") is True])
    return found


def _is_sample(line: dict) -> bool:
    texts = all(isinstance(line.get(name), str) for name in ("real", "opponent", "policy"))
    return texts and isinstance(line.get("row"), int) and isinstance(line.get("prompt"), list)


def _entry(row: int, turns: list, real: str) -> dict:
    prompt = [[str(turn.get("role")), _cut(str(turn.get("content")))] for turn in turns if isinstance(turn, dict)]
    return {"row": row, "prompt": prompt, "real": _cut(real), "answers": [], "margins": []}


def _cut(text: str) -> str:
    more = len(text) - CHARACTERS
    return text if more <= 0 else f"{text[:CHARACTERS]} ... ({more:,} more characters)"


def _pairs(record: RunRecord, most: int) -> dict[int, dict]:
    """Of `pairs.parquet`, where there are no samples: so many prompts, and what each opponent has answered."""
    found: dict[int, dict] = {}
    for name, directory in record.directories.items():
        table = _table(record, directory, ["row", "real", "generated", "generated_truncated"])
        if table is not None and name.startswith(ITERATION):
            for line in table.take(_spread(len(table), most)).to_pylist():
                *prompt, real = line["real"]
                entry = found.setdefault(line["row"], _entry(line["row"], prompt, real["content"]))
                text = _cut(line["generated"][-1]["content"])
                entry["answers"].append([f"opponent of {name}", text, bool(line["generated_truncated"])])
    return found


def _margins(record: RunRecord) -> dict[int, dict[int, float]]:
    """iteration -> row -> margin, of several responses to a prompt their mean."""
    found = {}
    for t, pairs in rewards(record).items():
        of_row = defaultdict(list)
        for pair in pairs:
            of_row[pair["row"]].append(pair["rewards/real"] - pair["rewards/generated"])
        found[t] = {row: float(np.mean(margins)) for row, margins in of_row.items()}
    return found


def rewards(record: RunRecord) -> dict[int, list[dict]]:
    """iteration -> the lines of its `rewards.jsonl`; empty for runs that did not keep it yet."""
    names = ("row", "rewards/real", "rewards/generated", "lengths/real", "lengths/generated")
    found = {}
    for name, directory in record.directories.items():
        if name.startswith(ITERATION):
            lines = record.lines(directory / REWARDS)
            kept = [line for line in lines if all(isinstance(line.get(of), int | float) for of in names)]
            found[int(name.removeprefix(ITERATION))] = kept
    return found


def lengths(record: RunRecord) -> dict[int, dict[str, np.ndarray]]:
    """iteration -> tokens of its responses, "real" and "generated": of the held-out pairs, or, where their lengths were
    not kept, of all generated responses alone."""
    found = {}
    for t, pairs in rewards(record).items():
        if pairs:
            found[t] = {of: np.array([pair[f"lengths/{of}"] for pair in pairs]) for of in ("real", "generated")}
        else:
            table = _table(record, record.workdir / f"iteration_{t}", ["generated_tokens"])
            if table is not None:
                counted = table["generated_tokens"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
                found[t] = {"generated": counted.astype(float)}
    return found


def _table(record: RunRecord, directory: Any, columns: list[str]) -> Any:
    """Columns of an iteration's pairs; None where there are none, or the file is damaged."""
    import pyarrow.parquet

    path = directory / PAIRS
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.read_table(file, columns=columns)
            return table if len(table) and set(columns) <= set(table.column_names) else None
    except Exception as error:  # noqa: BLE001  pyarrow raises what it likes
        record.unread.append(f"{path} is damaged: {error}")
        return None
