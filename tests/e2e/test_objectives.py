"""Objectives in a run: one without a reference, and one whose responses nobody has."""

import pytest
import tiny_files

import spin_jax
from spin_jax import config as config_lib
from spin_jax.errors import UserError
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import Objective
from spin_jax.reports import REPORTS
from spin_jax.runtime.metric_writer import read_metrics
from spin_jax.self_play.run import open_run


@pytest.mark.parametrize("opponent", ["stored", "live"])
def test_without_a_reference_nothing_is_scored_before_training(tiny_model, tmp_path, opponent):
    model, rows = spin_jax.load(tiny_model), tiny_files.make_rows()
    overrides = tiny_files.SETTINGS | {"iterations": 1, "spin.loss": "sft", "spin.opponent": opponent}
    spin_jax.spin(model, rows, tmp_path, overrides)
    iteration = tmp_path / "iteration_0"
    assert not (iteration / "scores" / "steps.npz").exists()
    rows = read_metrics(iteration / "metrics.jsonl")
    # A mean over tokens, near log(vocabulary) for a random model: a sum over a response would be many times that.
    assert [plot.name for plot in (tmp_path / "plots").iterdir()] == ["loss.png"], "nothing else has a curve"
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
