"""A whole iteration of a model whose layers are of two kinds: sampled, scored, trained and exported as what it is."""

import json
import math

import jax
import numpy as np
import pytest
import tiny_files

from spin_jax import checkpoints
from spin_jax.runtime.metric_writer import read_metrics
from spin_jax.self_play.algorithm import self_play


def test_gemma_plays_against_itself(tiny_data, tmp_path):
    start = tiny_files.write_model(tmp_path / "gemma", tiny_files.GEMMA)
    config = tiny_files.make_config(start, tiny_data, {"iterations": 1, "train.epochs": 2.0})
    rows = self_play(config, tmp_path / "run")
    end = tmp_path / "run" / "iteration_0" / "model"
    logged = read_metrics(tmp_path / "run" / "iteration_0" / "metrics.jsonl")
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and logged[0]["rewards/margin"] == 0
    assert logged[-1]["loss"] < 0.95 * math.log(2)
    assert rows[-1]["model"] == "iteration 0"
    (model, before), (trained, after) = checkpoints.load(start), checkpoints.load(end)
    assert trained == model and model.windows == (4, None, 4)
    changed = jax.tree.map(lambda x, y: bool(np.any(x != y)), before, after)
    assert all(jax.tree.leaves(changed))
    assert json.loads((end / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
