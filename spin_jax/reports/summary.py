"""One table with a row for each model of a run: `summary.json` and `summary.txt`."""

import contextlib
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from spin_jax.reports.record import RunRecord
from spin_jax.runtime import metric_writer

WIDTH = 120  # characters: what a terminal or a page of code holds


def summary(record: RunRecord) -> dict[str, str]:
    """The rows as JSON, and as a table."""
    rows = "[\n" + ",\n".join(map(metric_writer.to_json, record.results)) + "\n]\n"
    return {"summary.json": rows, "summary.txt": summary_table(record.results) + "\n"}


def read_summary(workdir: epath.PathLike) -> list[dict]:
    """The rows that `summary.json` has; empty where it is not there or damaged: it is written again."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        rows = (epath.Path(workdir) / "summary.json").read_text()
        return [dict(row) for row in json.loads(rows, object_hook=metric_writer.restore)]
    return []


def summary_table(rows: Sequence[Mapping[str, object]], width: int = WIDTH) -> str:
    """A text table: a line for each row (a model), a column for each field that any row has, in the order first met.

    A name's parts (`held_out/rewards/margin`) stand below each other, to keep the columns narrow. Numbers of a column
    share their decimals, four significant digits for the largest; what a row does not have, or is None, is a dash. A
    `_stderr` of a field stands behind its number, as "0.5000 ±0.0123".
    Columns beyond `width` characters go below, behind the first one again.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if not name.endswith("_stderr")))
    depth = max((len(name.split("/")) for name in names), default=0)
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        heading = name.split("/")
        errors = [row.get(f"{name}_stderr") for row in rows]
        column = [""] * (depth - len(heading)) + heading + cells(values, errors)
        widest = max(map(len, column))
        column.insert(depth, "-" * widest)
        pad = str.ljust if any(isinstance(value, str) for value in values) else str.rjust
        columns.append([pad(part, widest) for part in column])
    blocks = [columns[:1]]
    for column in columns[1:]:
        if sum(2 + len(one[0]) for one in (*blocks[-1], column)) > width and len(blocks[-1]) > 1:
            blocks.append(columns[:1])
        blocks[-1] = [*blocks[-1], column]
    tables = ("\n".join("  ".join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks)
    return "\n\n".join(tables)


def cells(values: Sequence[Any], errors: Sequence[Any]) -> list[str]:
    """The cells of one column, from its values and their standard errors."""
    values = [value if value is None or isinstance(value, str | numbers.Integral) else float(value) for value in values]
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value) and value]
    # 0.9855, 2.220, 64.05, 1234: four significant digits of the largest; and never a column of zeros.
    digits = 3 - math.floor(math.log10(max(sizes, default=1.0)))
    style = f".{min(max(digits, 0), 4)}f" if digits <= 6 else ".3e"

    def cell(value: object, error: float | None) -> str:
        if value is None:
            return "-"
        text = format(value, style) if isinstance(value, float) else str(value)
        return text if error is None else f"{text} ±{error:{style}}"

    return list(map(cell, values, errors))
