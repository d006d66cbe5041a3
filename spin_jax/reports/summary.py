"""What a run shows for itself: curves over all iterations (PNG), and one table with a row for each model."""

import contextlib
import io
import itertools
import json
import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from spin_jax.runtime import files, metric_writer

RESULT = "result.json"

_LOG = logging.getLogger(__name__)


class Plot(NamedTuple):
    """One figure. Curves are (metric, label); `rule` is a level worth comparing with, and what it means."""

    name: str
    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    rule: tuple[float, str] | None = None


PLOTS = (
    Plot("loss", "SPIN loss", "loss", (("loss", "loss"),)),
    Plot(
        "margin",
        "How much more the policy prefers real to generated responses than its opponent does",
        "margin (reward of real - reward of generated)",
        (("rewards/margin", "margin"),),
        (0.0, "no better than the opponent"),
    ),
    Plot(
        "accuracy",
        "How often the real response has the higher reward",
        "reward accuracy (share of pairs)",
        (("rewards/accuracy", "accuracy"),),
        (0.5, "a coin"),
    ),
    Plot(
        "logps",
        "Log-probability of whole responses under the policy",
        "log-probability of a response (nats)",
        (("logps/real", "real"), ("logps/generated", "generated")),
    ),
)


def plot_iterations(workdir: epath.PathLike) -> list[epath.Path]:
    """Draws loss, margin, accuracy and log-probs of every iteration; returns the PNGs written under `workdir/plots`.

    Steps are counted over the whole run; a vertical line is where the opponent was replaced. A row of the summary that
    has `iteration` (the number of the iteration that trained the model) and fields `held_out/METRIC`
    (`held_out/rewards/margin`, for one) adds a point at that iteration's end. Empty where no iteration has metrics yet.
    """
    workdir = epath.Path(workdir)
    iterations = _iterations(workdir)
    if not iterations:
        return []
    held_out = {row["iteration"]: row for row in read_summary(workdir) if row.get("iteration") is not None}
    logged = {metric for rows in iterations.values() for row in rows for metric in row}
    plots = [plot for plot in PLOTS if logged & {metric for metric, _ in plot.curves}]  # an objective may lack a margin
    paths = [workdir / "plots" / f"{plot.name}.png" for plot in plots]
    for plot, path in zip(plots, paths, strict=True):
        files.write_whole(path, _draw(plot, iterations, held_out))
    return paths


def summary_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A text table: a line for each row (a model), a column for each field that any row has, in the order first met.

    A name's parts (`held_out/rewards/margin`) stand below each other, to keep the columns narrow. Numbers of a column
    share their decimals, four significant digits for the largest; what a row does not have, or is None, is a dash.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    depth = max((len(name.split("/")) for name in names), default=0)
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        heading = name.split("/")
        column = [""] * (depth - len(heading)) + heading + _cells(values)
        width = max(map(len, column))
        column.insert(depth, "-" * width)
        pad = str.ljust if any(isinstance(value, str) for value in values) else str.rjust
        columns.append([pad(part, width) for part in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def write_result(directory: epath.Path, row: Mapping[str, object]) -> None:
    """Keeps the summary's row of the model that was measured for `directory`."""
    files.write_whole(directory / RESULT, metric_writer.to_json(row) + "\n")


def read_result(directory: epath.Path) -> dict | None:
    """The row that `write_result` kept; None where there is none, or a damaged one: it can be measured again."""
    path = directory / RESULT
    if not path.exists():
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        row = json.loads(path.read_text(), object_hook=metric_writer.restore)
        if "model" in row and "iteration" in row:
            return row
    _LOG.warning("%s is damaged: measured again", path)
    return None


def read_results(workdir: epath.Path) -> list[dict]:
    """The rows of all models that a run has measured, in the order in which they were made."""
    rows = [read_result(workdir)]
    for t in itertools.count():
        iteration = workdir / f"iteration_{t}"
        if not iteration.exists():
            return [row for row in rows if row]
        rows += [read_result(iteration), read_result(iteration / "control")]


def last_step(iteration: epath.Path) -> dict[str, float]:
    """Margin and accuracy of an iteration's last training step, as far as its objective has them, for a summary without
    held-out rows."""
    row = metric_writer.read_metrics(iteration / metric_writer.FILE_NAME)[-1]
    return {f"last_step/{name}": row[name] for name in ("rewards/accuracy", "rewards/margin") if name in row}


def write_summary(workdir: epath.PathLike, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes `workdir/summary.json` (a list of objects) and `summary.txt` (the table), each whole or not at all."""
    workdir = epath.Path(workdir)
    files.write_whole(workdir / "summary.json", "[\n" + ",\n".join(map(metric_writer.to_json, rows)) + "\n]\n")
    files.write_whole(workdir / "summary.txt", summary_table(rows) + "\n")


def read_summary(workdir: epath.PathLike) -> list[dict]:
    """The rows that `write_summary` wrote; empty where it has not, or the file is damaged: it is written again."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        summary = (epath.Path(workdir) / "summary.json").read_text()
        return [dict(row) for row in json.loads(summary, object_hook=metric_writer.restore)]
    return []


def _cells(values: Sequence[object]) -> list[str]:
    """The cells of one column."""
    values = [value if value is None or isinstance(value, str | numbers.Integral) else float(value) for value in values]
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value) and value]
    # 0.9855, 2.220, 64.05, 1234: four significant digits of the largest; and never a column of zeros.
    digits = 3 - math.floor(math.log10(max(sizes, default=1.0)))
    style = f".{min(max(digits, 0), 4)}f" if digits <= 6 else ".3e"

    def cell(value: object) -> str:
        if value is None:
            return "-"
        return format(value, style) if isinstance(value, float) else str(value)

    return [cell(value) for value in values]


def _iterations(workdir: epath.Path) -> dict[int, list[dict]]:
    """Iteration number -> its rows of metrics, in order."""
    found = {}
    for path in files.find(workdir, f"iteration_*/{metric_writer.FILE_NAME}"):
        number = path.parent.name.removeprefix("iteration_")
        if number.isdigit() and (rows := metric_writer.read_metrics(path)):
            found[int(number)] = rows
    return dict(sorted(found.items()))


def _draw(plot: Plot, iterations: dict[int, list[dict]], held_out: dict[int, dict]) -> bytes:
    """One figure as PNG bytes."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    ends = dict(zip(iterations, np.cumsum([rows[-1]["step"] for rows in iterations.values()]), strict=True))
    starts = dict(zip(iterations, [0, *ends.values()], strict=False))
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(ylabel=plot.unit)
    axes.set_xlabel("optimizer step over the whole run (pale: each logged step; dark: running mean)")
    axes.set_title(plot.title, fontsize="medium", pad=22)
    for color, (metric, label) in zip(("C0", "C1"), plot.curves, strict=False):
        for iteration, rows in iterations.items():
            steps = [starts[iteration] + row["step"] for row in rows]
            values = np.array([row.get(metric) for row in rows], dtype=float)  # None becomes NaN: a gap
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=1, marker="." if len(rows) < 40 else None)
            axes.plot(steps, _running_mean(values), color=color, label=label if not starts[iteration] else None)
        points = [(ends[t], row.get(f"held_out/{metric}")) for t, row in held_out.items() if t in ends]
        if points := [point for point in points if point[1] is not None]:
            axes.plot(*zip(*points, strict=True), "D", color=color, markeredgecolor="black", label=f"{label}, held-out")
    for iteration, start in starts.items():
        axes.axvline(start, color="0.6", linewidth=1)
        middle, above = (start + ends[iteration]) / 2, axes.get_xaxis_transform()
        axes.text(middle, 1.02, f"iteration {iteration}", transform=above, ha="center", color="0.3")
    if plot.rule:
        axes.axhline(plot.rule[0], color="0.3", linestyle=":", label=plot.rule[1])
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the values, over those there are near the ends and beside a NaN."""
    window = np.ones(2 * (len(values) // 40) + 1)
    present = np.isfinite(values)
    counts = np.convolve(present, window, mode="same")
    with np.errstate(invalid="ignore"):
        means = np.convolve(np.where(present, values, 0.0), window, mode="same") / counts
    return np.where(present, means, np.nan)
