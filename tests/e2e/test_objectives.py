"""Objectives in a run: one without a reference, one of three responses, a mixed reference, and what is refused."""

import json
import re

import numpy as np
import pytest
import tiny_files

import spin_jax
from spin_jax import config as config_lib
from spin_jax.errors import UserError
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import Objective
from spin_jax.reports import REPORTS
from spin_jax.reports.html import CHARTS
from spin_jax.runtime.metric_writer import read_metrics
from spin_jax.self_play.algorithm import self_play
from spin_jax.self_play.pairs import pairs_of
from spin_jax.self_play.run import open_run
from spin_jax.self_play.training_stage import spin_stage

FEW_PROGRAMS = {"train.row_shapes": 1, "train.checkpoint_every": 100}


@pytest.mark.parametrize("opponent", ["stored", "live"])
def test_without_a_reference_nothing_is_scored_before_training(tiny_model, tmp_path, opponent):
    model, rows = spin_jax.load(tiny_model), tiny_files.make_rows()
    overrides = tiny_files.SETTINGS | {"iterations": 1, "spin.loss": "sft", "spin.opponent": opponent}
    spin_jax.spin(model, rows, tmp_path, overrides)
    iteration = tmp_path / "iteration_0"
    assert not (iteration / "scores" / "steps.npz").exists()
    rows = read_metrics(iteration / "metrics.jsonl")
    # A mean over tokens, near log(vocabulary) for a random model: a sum over a response would be many times that.
    page = (tmp_path / "report.html").read_text()
    absent = {chart.title for chart in CHARTS} - set(re.findall(r'class="chart">\s*<h3>(.*?)(?: <small>|</h3>)', page))
    compared = {"Rewards", "Margin", "Reward accuracy", "Log-prob of a response", "KL from the opponent"}
    assert absent == compared, "what it has not logged"
    assert 0 < rows[0]["loss"] < 10 and "rewards/margin" not in rows[0] and "lengths/generated" not in rows[0]


def test_an_objective_whose_responses_nobody_has_is_refused_before_anything_is_read(tmp_path, own_registries):
    OBJECTIVES.register("of three", Objective(lambda *logps: None, ("real", "chosen")))
    paths = {"model.path": "nowhere", "data.train": "nowhere"}
    config = config_lib.replace(config_lib.Config(), paths | {"spin.loss": "of three"})
    with pytest.raises(UserError, match=r"needs a response called 'chosen', and a pair has real, generated, proto"):
        open_run(config, tmp_path)


@pytest.mark.parametrize("registry, changes", [(OBJECTIVES, {"spin.loss": "mine"}), (REPORTS, {})])
def test_what_is_registered_and_cannot_be_imported_is_refused_before_anything_is_read(
    registry, changes, tmp_path, own_registries
):
    registry.register("mine", "no_such_module:mine")
    config = config_lib.replace(config_lib.Config(), {"model.path": "nowhere", "data.train": "nowhere"} | changes)
    with pytest.raises(UserError, match="'mine' is registered as no_such_module:mine, which cannot be imported"):
        open_run(config, tmp_path)


@pytest.fixture(scope="module")
def triplets(tiny_model, tiny_data, tmp_path_factory):
    """A workdir in which T-SPIN has played two iterations, two generated responses to a prompt; with the NLL term."""
    workdir = tmp_path_factory.mktemp("triplets")
    changes = {"spin.loss": "tspin", "spin.nll_weight": 0.5, "generate.responses": 2, "spin.beta": (1.0,)}
    config = tiny_files.make_config(tiny_model, tiny_data, FEW_PROGRAMS | changes)
    self_play(config, workdir)
    return config, workdir


def test_t_spin_has_the_responses_of_theta_0_in_every_iteration(triplets):
    config, workdir = triplets
    run = open_run(config, workdir)
    firsts = {(pair.row, i % 2): pair.responses[1] for i, pair in enumerate(pairs_of(run, 0)[0])}
    for t in range(2):
        stage = spin_stage(run, t)
        assert len(stage.pairs) == (t + 1) * len(firsts)  # with those of the iteration before
        for i, pair in enumerate(stage.pairs):
            np.testing.assert_array_equal(pair.responses[2], firsts[pair.row, i % 2])
        same = [np.array_equal(*pair.responses[1:]) for pair in stage.pairs if pair.iteration == t]
        assert all(same) == (t == 0)


def test_t_spin_trains_without_scores_and_without_history_at_first(triplets):
    _, workdir = triplets
    for t, weight in enumerate((0.0, 0.1)):
        assert not (workdir / f"iteration_{t}" / "scores" / "steps.npz").exists()
        first = read_metrics(workdir / f"iteration_{t}" / "metrics.jsonl")[0]
        assert first["loss"] == pytest.approx(first["loss/objective"] + 0.5 * first["loss/nll"], rel=1e-5)
        assert {"lengths/proto", "truncated/proto", "logps/proto", "rewards/proto"} <= set(first)
        if not weight:
            assert first["rewards/history_margin"] == pytest.approx(0, abs=1e-5)
    results = [json.loads((workdir / f"iteration_{t}" / "result.json").read_text()) for t in range(2)]
    assert all({"held_out/rewards/margin", "held_out/nats_per_token"} <= set(row) for row in results)


def test_a_mixed_reference_is_that_of_both_models(tiny_model, tiny_data, tmp_path):
    """alpha log p_t + (1 - alpha) log p_0 of the same pairs, in an iteration after the first."""
    share, beta = 0.25, 0.5
    changes = {"spin.loss": "ipo_per_token", "spin.opponent_share": share, "spin.beta": (beta,), "spin.nll_weight": 0.1}
    config = tiny_files.make_config(tiny_model, tiny_data, FEW_PROGRAMS | changes)
    self_play(config, tmp_path)
    first = [read_metrics(tmp_path / f"iteration_{t}" / "metrics.jsonl")[0] for t in range(2)]
    assert first[0]["loss/objective"] == pytest.approx(1 / (4 * beta**2), rel=1e-6)
    assert not (tmp_path / "iteration_0" / "scores" / "first_steps.npz").exists()

    scores = tmp_path / "iteration_1" / "scores"
    opponent, theta_0 = (np.load(scores / f"{name}.npz")["logps"][0] for name in ("steps", "first_steps"))
    run = open_run(config, tmp_path)
    stage = spin_stage(run, 1)
    lengths = [[len(y) for y in stage.pairs[i].responses] for row in stage.plan.batches[0] for i in row]
    ratios = (1 - share) * (opponent - theta_0)  # the policy starts as the opponent
    margins = (ratios / lengths) @ (1, -1)
    assert np.abs(margins).max() > 1e-3
    assert first[1]["loss/objective"] == pytest.approx(np.mean((margins - 1 / (2 * beta)) ** 2), rel=1e-4)
    assert first[1]["rewards/margin"] == pytest.approx(beta * np.mean(ratios @ (1, -1)), rel=1e-3)
