"""Which evaluators a config means, and what becomes of what they find."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tiny
from etils import epath

from spin_jax.config import Config, replace
from spin_jax.errors import UserError
from spin_jax.evaluation import EVALUATORS
from spin_jax.evaluation.interface import Evaluator, Subject, chosen, evaluate, is_due

TOY = {"data.train": "toy:", "model.path": "toy:"}


def config_of(changes: dict[str, object]) -> Config:
    return replace(Config(), {"data.train": "my.jsonl", "model.path": "mine"} | changes)


@pytest.mark.parametrize(
    "changes, names",
    [
        ({}, []),
        ({"data.eval_rows": 8}, ["rewards", "samples"]),
        (TOY | {"data.eval_rows": 8}, ["rewards", "samples", "exact"]),
        (TOY | {"evaluate.evaluators": ("exact",)}, ["exact"]),
        (TOY | {"evaluate.evaluators": ("exact", "auto"), "data.eval_rows": 8}, ["exact", "rewards", "samples"]),
        ({"data.eval_rows": 8, "evaluate.evaluators": ()}, []),
    ],
)
def test_auto_is_what_the_data_allow(changes, names):
    assert list(chosen(config_of(changes))) == names


@pytest.mark.parametrize(
    "name, says", [("rewards", "needs held-out rows: set --config.data.eval_rows"), ("exact", "measures the task of")]
)
def test_what_cannot_measure_is_refused_where_it_is_named(name, says):
    with pytest.raises(UserError, match=f"--config.evaluate.evaluators: {name} {says}"):
        chosen(config_of({"evaluate.evaluators": (name,)}))


def test_one_that_is_registered_is_among_auto_if_it_says_so(own_registries):
    EVALUATORS.register("dear", Evaluator(lambda subject: {}))
    EVALUATORS.register("cheap", Evaluator(lambda subject: {}, auto=True))
    assert list(chosen(config_of({}))) == ["cheap"]
    assert list(chosen(config_of({"evaluate.evaluators": ("auto", "dear")}))) == ["cheap", "dear"]


def test_costly_ones_measure_every_few_iterations_and_the_last(own_registries):
    EVALUATORS.register("dear", Evaluator(lambda subject: {"dear": 1.0}, costly=True))
    config = config_of({"evaluate.every": 2, "iterations": 5, "evaluate.evaluators": ("dear",)})
    assert [is_due(config, t) for t in range(5)] == [False, True, False, True, True]
    assert "dear" in evaluate(subject(config, 0)) and "dear" not in evaluate(subject(config, 0), costly=False)


def subject(config, iteration: int | None, directory: pathlib.Path | None = None) -> Subject:
    """A model with these log-probs of two held-out pairs, of 4 and 1 real tokens."""
    policy, opponent = np.array([(-1.0, -9.0), (-4.0, -4.0)]), np.array([(-2.0, -5.0), (-4.0, -5.0)])
    of_opponent = None if iteration is None else (lambda: opponent)
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(Subject))
    return Subject(
        **nothing
        | {"name": "mine", "iteration": iteration, "config": config, "directory": directory}
        | {"held_out": tiny.pairs(tiny.LENGTHS[:2])}
        | {"held_out_logps": lambda: policy, "opponent_logps": of_opponent}
    )


def test_a_row_of_the_summary_is_what_is_known_and_what_was_found(tmp_path):
    """Rewards have the beta of the iteration; a model without an opponent has none."""
    changes = {"data.eval_rows": 2, "spin.beta": (0.1, 2.0), "evaluate.evaluators": ("rewards",)}
    config = config_of(changes)
    row = evaluate(subject(config, 1, epath.Path(tmp_path)), {"generated/tokens": 3.0})
    assert list(row)[:4] == ["model", "iteration", "generated/tokens", "held_out/nats_per_token"]
    assert (tmp_path / "rewards.jsonl").exists()
    assert row["held_out/rewards/margin"] == 4.0 and row["held_out/nats_per_token"] == 1.0
    assert evaluate(subject(config, None)) == {"model": "mine", "iteration": None, "held_out/nats_per_token": 1.0}
