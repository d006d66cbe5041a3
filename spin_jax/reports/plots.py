"""Curves over all iterations of a run, as PNGs under `plots/`."""

import io
from typing import NamedTuple

import numpy as np

from spin_jax.reports.record import RunRecord


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
    Plot(
        "logps_per_token",
        "Log-probability of a response's tokens under the policy, their mean",
        "log-probability a token (nats)",
        (("logps_per_token/real", "real"), ("logps_per_token/generated", "generated")),
    ),
    Plot(
        "kl",
        "How far the policy has gone from its opponent, by the generated responses",
        "KL(opponent || policy) a token, estimated (nats)",
        (("kl/generated", "generated"),),
        (0.0, "the opponent itself"),
    ),
    Plot(
        "entropy",
        "How undecided the policy is about the next token",
        "entropy of the next token (nats)",
        (("entropy/real", "in real responses"), ("entropy/generated", "in generated responses")),
    ),
    Plot(
        "lengths",
        "How long the responses of a batch are",
        "length of a response (tokens)",
        (("lengths/real", "real"), ("lengths/generated", "generated")),
    ),
    Plot("grad_norm", "Global norm of the gradient, before clipping", "gradient norm", (("grad_norm", "norm"),)),
)


def plots(record: RunRecord) -> dict[str, bytes]:
    """Each of `PLOTS` that was logged, over every iteration; none where no iteration has metrics yet.

    Steps are counted over the whole run; a vertical line is where the opponent was replaced. A result that has
    `iteration` (the number of the iteration that trained the model) and fields `held_out/METRIC`
    (`held_out/rewards/margin`, for one) adds a point at that iteration's end.
    """
    held_out = {row["iteration"]: row for row in record.results if row.get("iteration") is not None}
    logged = {metric for rows in record.metrics.values() for row in rows for metric in row}
    drawn = [plot for plot in PLOTS if logged & {metric for metric, _ in plot.curves}]  # an objective may lack a margin
    return {f"plots/{plot.name}.png": _draw(plot, record.metrics, held_out) for plot in drawn}


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
