"""Runs that are healthy or fail on purpose, and the pictures of them in docs/reading_the_curves.md.

    python benchmarks/curves.py [--workdir=runs/curves] [--images=docs/images] [--only=NAME,NAME]

Each run is configs/quickstart.py with the changes of RUNS, in a directory of its own; those that start alike share the
healthy run's SFT model. A run that is there already is only drawn: the same command goes on where it was stopped.
"""

import argparse
import io
import itertools
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from spin_jax.reports.record import RunRecord  # noqa: E402

Metrics = dict[int, list[dict]]  # RunRecord.metrics

HEALTHY = "healthy"
# Room for responses that do not end; an opponent that SPIN can still learn from, after one pass of SFT.
BASE = {
    "sft.control": "False",
    "sft.epochs": "1.0",
    "iterations": "2",
    "toy.eval_prompts": "64",
    "data.max_length": "24",
    "generate.max_new_tokens": "12",
    "train.batch_size": "32",
    "train.epochs": "1.0",
    "train.row_length": "96",
    "spin.previous_iterations": "0",
}
RUNS = {
    HEALTHY: {"spin.beta": "(1.0,)", "train.learning_rate": "(3e-4,)"},
    "both_fall": {
        "toy.train_rows": "2048",
        "sft.epochs": "4.0",
        "iterations": "1",
        "train.epochs": "2.0",
        "spin.beta": "(0.1,)",
        "train.learning_rate": "(3e-4,)",
    },
    "runs_away": {"spin.beta": "(0.1,)", "train.learning_rate": "(3e-3,)"},
    "too_easy": {
        "iterations": "1",
        "train.epochs": "2.0",
        "generate.temperature": "5.0",
        "spin.beta": "(1.0,)",
        "train.learning_rate": "(3e-4,)",
    },
    "nothing_left": {
        "toy.train_rows": "16384",
        "sft.epochs": "4.0",
        "train.batch_size": "64",
        "iterations": "1",
        "train.epochs": "0.5",
        "spin.beta": "(1.0,)",
        "train.learning_rate": "(3e-4,)",
    },
}
START = ("sft.", "toy.", "train.batch_size")  # of what else a start depends on, no run changes anything


class Panel(NamedTuple):
    """Curves (metric, label) on one axis, and its title."""

    title: str
    curves: tuple[tuple[str, str], ...]


class Picture(NamedTuple):
    """Panels of a run, beside the same of the healthy one."""

    run: str
    panels: tuple[Panel, ...]


def both(title: str, prefix: str) -> Panel:
    """Of the real and the generated responses."""
    return Panel(title, ((f"{prefix}/real", "real"), (f"{prefix}/generated", "generated")))


LOSS = Panel("loss (nats)", (("loss", "loss"),))
GRADIENT = Panel("norm of the gradient", (("grad_norm", "norm"),))
MARGIN = Panel("margin (nats)", (("rewards/margin", "margin"),))
ACCURACY = Panel("reward accuracy (share of pairs)", (("rewards/accuracy", "accuracy"),))
KL = Panel("KL to the opponent (nats a token)", (("kl/generated", "KL"),))
LOGPS = both("log-prob of a response (nats)", "logps")
ENTROPY = both("entropy of the next token (nats)", "entropy")
LENGTHS = both("length of a response (tokens)", "lengths")
TRUNCATED = Panel("generated responses cut (share)", (("truncated/generated", "generated"),))
PICTURES = {
    HEALTHY: Picture(HEALTHY, (LOGPS, MARGIN, ACCURACY)),
    "both_fall": Picture("both_fall", (LOGPS, MARGIN, KL)),
    "runs_away": Picture("runs_away", (KL, ENTROPY, MARGIN)),
    "runs_on": Picture("runs_away", (LENGTHS, TRUNCATED, LOGPS)),
    "too_easy": Picture("too_easy", (ACCURACY, LOSS, GRADIENT)),
    "nothing_left": Picture("nothing_left", (ACCURACY, MARGIN, LOSS)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=ROOT / "runs/curves")
    parser.add_argument("--images", type=pathlib.Path, default=ROOT / "docs/images")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(RUNS), help="runs beside the healthy")
    flags = parser.parse_args()
    names = list(dict.fromkeys([HEALTHY, *flags.only]))
    for name in names:
        play(name, flags.workdir)
    metrics = {name: RunRecord.load(flags.workdir / name).metrics for name in names}
    flags.images.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        if picture.run in metrics:
            (flags.images / f"curves_{name}.svg").write_bytes(draw(picture, metrics))


def play(name: str, workdir: pathlib.Path) -> None:
    """One run, in a process of its own."""
    directory, healthy = workdir / name, workdir / HEALTHY
    if name != HEALTHY and not directory.exists() and not any(field.startswith(START) for field in RUNS[name]):
        for made in ("toy", "sft"):
            shutil.copytree(healthy / made, directory / made)
    print(" ".join(words := command(name, directory)), flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def command(name: str, directory: pathlib.Path) -> list[str]:
    """What Python is given for a run."""
    changes = [f"--config.{field}={value}" for field, value in (BASE | RUNS[name]).items()]
    return ["-m", "spin_jax.main", "--config=configs/quickstart.py", f"--workdir={directory}", *changes]


# ---- pictures


POINTS = 12  # of a curve an iteration: each is a mean over about ten steps, 320 pairs
# Of one brightness between white and black, to be read on both.
TEXT, GREY, COLORS = "#777777", "#9a9a9a", ("#2f8fd0", "#d9822b")


def draw(picture: Picture, metrics: Mapping[str, Metrics]) -> bytes:
    """SVG: the run in colour, the healthy one in grey. `metrics` are of runs, by their names."""
    import matplotlib
    from matplotlib.figure import Figure

    of_run = metrics[picture.run]
    healthy = {t: metrics[HEALTHY][t] for t in of_run} if picture.run != HEALTHY else {}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": picture.run, "font.size": 9}):
        figure = Figure(figsize=(3.2 * len(picture.panels), 3.1), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(picture.panels)), picture.panels, strict=True):
            draw_panel(axes, panel, of_run, healthy)
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(rb"(\d\.\d\d)\d+", rb"\1", svg.getvalue())  # hundredths of a point: half the file


def draw_panel(axes, panel: Panel, iterations: Metrics, healthy: Metrics) -> None:
    for (metric, label), color, style in zip(panel.curves, COLORS, ("-", "--"), strict=False):
        if healthy:
            beside = f"{label}, healthy" if len(panel.curves) > 1 else "healthy run"
            axes.plot(*curve(healthy, metric), style, color=GREY, linewidth=1.2, label=beside)
        axes.plot(*curve(iterations, metric), color=color, linewidth=1.6, label=label)
    ends = list(itertools.accumulate(rows[-1]["step"] for rows in iterations.values()))
    for end in ends[:-1]:
        axes.axvline(end, color=GREY, linewidth=0.8, linestyle=":")  # a new opponent
    axes.set_xlabel("optimizer step", color=TEXT)
    axes.set_title(panel.title, fontsize=9, color=TEXT)
    axes.tick_params(colors=TEXT)
    axes.spines[:].set_color(GREY)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.curves) > 1 or healthy:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.24), "ncols": 2}
        axes.legend(frameon=False, labelcolor=TEXT, fontsize=7.5, **below)


def curve(iterations: Metrics, metric: str) -> tuple[list[float], list[float]]:
    """Steps over the whole run, and means over neighbouring ones; a gap where the opponent was replaced."""
    steps, values, start = [], [], 0
    for rows in iterations.values():
        for part in np.array_split(np.arange(len(rows)), min(POINTS, len(rows))):
            steps.append(start + np.mean([rows[i]["step"] for i in part]))
            values.append(np.mean([rows[i][metric] for i in part]))
        start += rows[-1]["step"]
        steps.append(np.nan)
        values.append(np.nan)
    return steps, values


if __name__ == "__main__":
    main()
