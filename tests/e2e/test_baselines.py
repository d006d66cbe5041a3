"""Baselines in the same loop: supervised fine-tuning, self-distillation and DPO, by fields of the config alone."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
import tiny_files

from spin_jax.data.pairs import read_sampled
from spin_jax.errors import UserError
from spin_jax.runtime.metric_writer import read_metrics
from spin_jax.self_play import flops
from spin_jax.self_play.algorithm import self_play
from spin_jax.self_play.run import open_run
from spin_jax.self_play.training_stage import spin_spec, spin_stage

FAST = {"iterations": 1, "evaluate.evaluators": ()}


def weights(model: pathlib.Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def spin(tmp_path_factory, tiny_model, tiny_data):
    """(workdir, summary) of SPIN itself."""
    workdir = tmp_path_factory.mktemp("spin")
    return workdir, self_play(tiny_files.make_config(tiny_model, tiny_data, FAST), workdir)


def test_sft_as_an_objective_is_the_sft_stage(tiny_model, tiny_data, tmp_path):
    """The same weights, bit for bit; and no response is sampled to train on."""
    changes = {"spin.loss": "sft", "train.epochs": 2.0, "train.learning_rate": (1e-3,), "train.optimizer": "adamw"}
    self_play(tiny_files.make_config(tiny_model, tiny_data, FAST | changes), tmp_path / "objective")
    changes = {"sft.epochs": 2.0, "sft.learning_rate": 1e-3, "sft.optimizer": "adamw"}
    self_play(tiny_files.make_config(tiny_model, tiny_data, FAST | changes), tmp_path / "stage")
    assert weights(tmp_path / "objective" / "iteration_0" / "model") == weights(tmp_path / "stage" / "sft" / "model")
    answered = read_sampled(tmp_path / "objective" / "iteration_0" / "generated" / "pairs.parquet")
    assert len(answered) == tiny_files.EVAL_ROWS


def test_the_whole_sequence_can_be_learned(tiny_model, tiny_data, tmp_path):
    changes = FAST | {"sft.epochs": 1.0, "sft.learning_rate": 1e-3, "sft.loss_on": "all"}
    config = tiny_files.make_config(tiny_model, tiny_data, changes)
    self_play(config, tmp_path)
    run = open_run(config, tmp_path)
    lengths = [len(run.tokens[e.row].prompt) + len(run.tokens[e.row].real) - 1 for e in run.train_examples]
    steps = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert np.mean([step["lengths/real"] for step in steps]) == pytest.approx(np.mean(lengths))


def test_self_distillation_learns_the_opponents_responses_for_spins_flops(spin, tiny_model, tiny_data, tmp_path):
    workdir, summary = spin
    changes = FAST | {"spin.loss": "ssd", "train.match_flops": str(workdir)}
    config = tiny_files.make_config(tiny_model, tiny_data, changes)
    rows = self_play(config, tmp_path)
    steps = read_metrics(tmp_path / "iteration_0" / "metrics.jsonl")
    sampled = read_sampled(tmp_path / "iteration_0" / "generated" / "pairs.parquet")
    for row, responses in read_sampled(workdir / "iteration_0" / "generated" / "pairs.parquet").items():
        np.testing.assert_array_equal(sampled[row][0][0], responses[0][0])
    stage = spin_stage(open_run(config, tmp_path), 0)
    assert len(steps) == stage.spec.steps > 2  # SPIN takes 2, of two responses each
    assert all(len(pair.responses) == 1 for pair in stage.pairs)
    of_a_step = rows[-1]["petaflops"] / len(steps)
    assert rows[-1]["petaflops"] == pytest.approx(summary[-1]["petaflops"], abs=of_a_step)
    assert {"logps_per_token/generated", "entropy/generated", "token_accuracy/generated"} <= steps[0].keys()


def test_flops_of_a_run_that_is_not_there_are_refused(tiny_model, tiny_data, tmp_path):
    changes = FAST | {"train.match_flops": str(tmp_path / "none")}
    with pytest.raises(UserError, match="none.*iteration_0/result.json says no petaflops: name the workdir of a run"):
        self_play(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path / "run")


def test_flops_of_a_run_that_are_too_few_are_refused(spin, tiny_model, tiny_data, tmp_path):
    """Not even a step, which is known before anything is sampled; or steps that are all warm-up, at whose learning
    rates nothing is learned."""
    result = json.loads((spin[0] / "iteration_0" / "result.json").read_text())
    for share, says in ((1e-3, "name a longer run"), (0.5, "are all warm-up")):
        (tmp_path / f"{share}" / "iteration_0").mkdir(parents=True)
        less = json.dumps(result | {"petaflops": share * result["petaflops"]})
        (tmp_path / f"{share}" / "iteration_0" / "result.json").write_text(less)
        changes = FAST | {"train.match_flops": str(tmp_path / f"{share}")}
        with pytest.raises(UserError, match=says):
            self_play(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path / f"run_{share}")
    assert not (tmp_path / "run_0.001" / "iteration_0").exists()


def test_what_an_iteration_costs_at_least(spin, tiny_model, tiny_data):
    """Less than what it costs when its responses are there, and as much where it reads none."""
    run = open_run(tiny_files.make_config(tiny_model, tiny_data, FAST), spin[0])
    sampling, step = flops._least_flops(run, 0)
    spec, pairs = spin_spec(run, 0)
    assert 0.5 < sampling / flops.sampling_flops(run, 0) < 1
    assert 0.5 < step / flops.iteration_step_flops(run, 0, spec, pairs) < 1
    run = dataclasses.replace(run, config=tiny_files.make_config(tiny_model, tiny_data, FAST | {"spin.loss": "sft"}))
    spec, pairs = spin_spec(run, 0)
    assert flops._least_flops(run, 0) == (0, flops.iteration_step_flops(run, 0, spec, pairs))


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("preferences") / "preferences.jsonl"
    rows = [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": row["response"][::-1] + "x"}
        for row in tiny_files.make_rows()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_dpo_on_preferences(tiny_model, preferences, tmp_path):
    """Two rounds: the rejected responses stay, the reference moves; nothing is sampled. The first loss is log 2, and so
    is the second round's."""
    changes = FAST | {"iterations": 2, "data.layout": "preference", "generate.source": "data", "train.epochs": 4.0}
    changes |= {"spin.previous_iterations": 1}  # of no effect: they would be the same pairs
    config = tiny_files.make_config(tiny_model, preferences, changes)
    self_play(config, tmp_path)
    assert not list(tmp_path.rglob("pairs.parquet"))
    for t in range(2):
        steps = read_metrics(tmp_path / f"iteration_{t}" / "metrics.jsonl")
        assert len(steps) == 4 * tiny_files.TRAIN_ROWS // 8
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["rewards/accuracy"] > 0.5
    assert weights(tmp_path / "iteration_0" / "model") != weights(tmp_path / "iteration_1" / "model")
    run = open_run(config, tmp_path)
    example, pair = run.train_examples[0], spin_stage(run, 1).pairs[0]
    assert pair.row == example.row and example.generated == example.response[::-1] + "x"
    stops = (run.chat.codec.decode(response) for response in pair.responses)
    assert list(stops) == [example.response, example.generated]


def test_data_without_generated_responses_are_refused(tiny_model, tiny_data, tmp_path):
    config = tiny_files.make_config(tiny_model, tiny_data, FAST | {"generate.source": "data"})
    with pytest.raises(UserError, match="generate.source=data: row .* has no generated response; rows need"):
        self_play(config, tmp_path)


def test_responses_that_only_some_rows_have_are_not_taken(tiny_model, tmp_path):
    """At iteration 0 the data's are taken if all rows have one; a row without would be trained on an empty one."""
    rows = tiny_files.make_rows()

    def turns(row: dict, answer: str) -> list[dict]:
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]

    given = [{"real": turns(row, row["response"]), "generated": turns(row, "zz")} for row in rows[:20]]
    data = tmp_path / "mixed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in given + rows[20:]))
    self_play(tiny_files.make_config(tiny_model, data, FAST), tmp_path / "run", ["generate"])
    sampled = read_sampled(tmp_path / "run" / "iteration_0" / "generated" / "pairs.parquet")
    assert len(sampled) == len(rows)
