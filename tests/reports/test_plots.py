"""The curves of a run."""

import io

import jax.numpy as jnp
import numpy as np

from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import token_metrics
from spin_jax.objectives.logprobs import Scores
from spin_jax.reports import plots as plots_lib
from spin_jax.reports.plots import PLOTS, plots
from spin_jax.reports.record import RunRecord


def record(iterations: list[int], steps: range, results: list[dict] | None = None) -> RunRecord:
    """Of a run of these iterations; log-probs were not logged."""

    def row(step: int) -> dict:
        return {"step": step, "loss": 0.7 / step, "rewards/margin": 0.1 * step, "rewards/accuracy": None}

    return RunRecord(None, {}, results or [], {t: list(map(row, steps)) for t in iterations})


def drawn(name: str, of: RunRecord, monkeypatch):
    """The axes of one plot, as matplotlib was asked to draw them."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw)))
    return figures[list(plots(of)).index(f"plots/{name}.png")].axes[0]


def test_a_plot_for_each_measure_that_was_logged():
    from matplotlib.image import imread

    assert plots(record([], range(0))) == {}
    files = plots(record([0, 1], range(1, 4)))
    assert list(files) == ["plots/loss.png", "plots/margin.png", "plots/accuracy.png"]
    for png in files.values():
        assert imread(io.BytesIO(png)).shape[:2] == (576, 1080)


def test_curves_of_tokens_are_what_objectives_log():
    x_BPY = jnp.ones((1, 1, 2))
    logged = token_metrics(OBJECTIVES["logistic"], Scores(x_BPY, x_BPY, x_BPY), x_BPY, x_BPY)
    curves = {metric for plot in PLOTS for metric, _ in plot.curves}
    assert {metric for metric in logged if not metric.startswith("token_accuracy/")} <= curves
    rows = [{"step": step, **dict.fromkeys(logged, 0.5)} for step in (1, 2)]
    assert list(plots(RunRecord(None, {}, [], {0: rows}))) == [
        "plots/logps_per_token.png",
        "plots/kl.png",
        "plots/entropy.png",
    ]


def test_plots_count_steps_over_the_run(monkeypatch):
    run = record(
        [0, 1, 2, 10],
        range(2, 11, 2),  # logged every second step
        [
            {"model": "SFT", "iteration": None, "held_out/rewards/margin": 0.0},
            {"model": "iteration 1", "iteration": 1, "held_out/rewards/margin": 0.75},
            {"model": "iteration 2", "iteration": 2, "held_out/rewards/margin": None},
            {"model": "not trained yet", "iteration": 11, "held_out/rewards/margin": 9.0},
        ],
    )
    axes = drawn("margin", run, monkeypatch)
    curves = [line for line in axes.lines if line.get_alpha() is not None]
    assert [list(line.get_xdata()) for line in curves] == [
        list(range(start + 2, start + 11, 2)) for start in (0, 10, 20, 30)
    ]
    np.testing.assert_allclose(curves[0].get_ydata(), [0.2, 0.4, 0.6, 0.8, 1.0])
    (held_out,) = [line for line in axes.lines if line.get_label() == "margin, held-out"]
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([20], [0.75])
    assert [text.get_text() for text in axes.texts] == ["iteration 0", "iteration 1", "iteration 2", "iteration 10"]
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert sorted(labels) == ["margin", "margin, held-out", "no better than the opponent"]


def test_running_mean():
    values = np.arange(80.0)
    values[10] = np.nan
    means = plots_lib._running_mean(values)  # a window of five
    np.testing.assert_allclose(means[[0, 9, 40, 79]], [1.0, (7 + 8 + 9 + 11) / 4, 40.0, 78.0])
    assert np.isnan(means[10]) and np.isnan(means).sum() == 1
    np.testing.assert_array_equal(plots_lib._running_mean(np.array([3.0])), [3.0])
    assert np.isnan(plots_lib._running_mean(np.array([np.nan]))).all()
