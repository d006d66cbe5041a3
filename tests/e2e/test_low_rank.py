"""A whole run with low-rank updates: what is exported, and that a cut run ends as one that was not."""

import json
import math
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny_files

import spin_jax
from spin_jax import checkpoints
from spin_jax.runtime.metric_writer import read_metrics
from spin_jax.runtime.preemption import Stopped
from spin_jax.self_play import training_stage
from spin_jax.self_play.algorithm import self_play
from spin_jax.self_play.run import open_run

RANK = 3
CHANGES = {"lora.rank": RANK, "train.learning_rate": (1e-2,), "train.epochs": 2.0, "spin.opponent": "live"}
CHANGES |= {"lora.dropout": 0.1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where adapters are merged


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, tiny_model, tiny_data):
    workdir = tmp_path_factory.mktemp("lora")
    rows = self_play(tiny_files.make_config(tiny_model, tiny_data, CHANGES), workdir)
    return workdir, rows


def test_each_iteration_is_its_opponent_and_a_low_rank_update(lora_run, tiny_model):
    """The exported model is a plain one: all but the linear layers to the bit, and these up to RANK directions."""
    workdir, rows = lora_run
    start = checkpoints.load(tiny_model)[1]
    for t in range(2):
        logged = read_metrics(workdir / f"iteration_{t}" / "metrics.jsonl")
        assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and logged[0]["rewards/margin"] == 0
        assert logged[-1]["loss"] < 0.95 * math.log(2)
        end = checkpoints.load(workdir / f"iteration_{t}" / "model")[1]
        for part in ("embed", "final_norm", "lm_head"):
            np.testing.assert_array_equal(*(list_of(tree[part]) for tree in (start, end)))
        for block, weights in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in weights:
                for before, after in zip(*(tree["layers"][block][name] for tree in (start, end)), strict=True):
                    inputs = math.prod(before.shape[:2]) if name == "o" else len(before)
                    sizes = np.linalg.svd(np.asarray(after - before).reshape(inputs, -1), compute_uv=False)
                    assert sizes[RANK - 1] > 1e-4 > 1e-5 > sizes[RANK], f"iteration {t}, {name}: {sizes}"
        start = end
    assert [row["model"] for row in rows] == ["SFT", "iteration 0", "iteration 1"]


def test_each_iteration_leaves_an_adapter_of_its_start(lora_run, tiny_model):
    """Merged into the model that it names, it is the exported one."""
    workdir, _ = lora_run
    for t, start in enumerate((tiny_model, workdir / "iteration_0" / "model")):
        adapter = workdir / f"iteration_{t}" / "adapter"
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(start)
        assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (RANK, 16, 0.1)
        merged = checkpoints.load(checkpoints.resolve(adapter))[1]
        exported = checkpoints.load(workdir / f"iteration_{t}" / "model")[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), merged, exported)


def test_a_run_starts_from_an_adapter_and_goes_on_wherever_it_is_merged(lora_run, tiny_data, tmp_path, monkeypatch):
    adapter = lora_run[0] / "iteration_1" / "adapter"
    config, sources = tiny_files.make_config(adapter, tiny_data, CHANGES), []
    for cache in "first", "second":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        sources.append(open_run(config, tmp_path / "run").source)
    first, second = (checkpoints.load(source)[1] for source in sources)
    assert sources[0] != sources[1]
    jax.tree.map(np.testing.assert_array_equal, first, second)
    model = spin_jax.load(adapter)
    assert model.sample(["abc"], max_new_tokens=4, temperature=0.0) == spin_jax.load(
        lora_run[0] / "iteration_1" / "model"
    ).sample(["abc"], max_new_tokens=4, temperature=0.0)


def list_of(part) -> np.ndarray:
    return np.asarray(part["embedding"] if isinstance(part, dict) else part)


def test_a_cut_run_ends_with_the_same_bits(lora_run, tiny_model, tiny_data, tmp_path, monkeypatch):
    workdir, _ = lora_run
    shutil.copytree(workdir / "iteration_0", tmp_path / "iteration_0")
    shutil.copytree(workdir / "iteration_1" / "generated", tmp_path / "iteration_1" / "generated")
    config, fit = tiny_files.make_config(tiny_model, tiny_data, CHANGES), training_stage.fit

    def interrupted(step_fn, state, opponent, make_batch, spec):
        def batch(step: int):
            if step == 4:
                signal.raise_signal(signal.SIGTERM)
            return make_batch(step)

        return fit(step_fn, state, opponent, batch, spec)

    with monkeypatch.context() as patch:
        patch.setattr(training_stage, "fit", interrupted)
        with pytest.raises(Stopped):
            self_play(config, tmp_path)
    assert not (tmp_path / "iteration_1" / "model").exists()
    self_play(config, tmp_path)
    cut, whole = (root / "iteration_1" / "model" / "model.safetensors" for root in (tmp_path, workdir))
    assert cut.read_bytes() == whole.read_bytes()


def test_updates_serve_supervised_fine_tuning_too(lora_run, tiny_model, tiny_data, tmp_path):
    """The SFT stage and the control that continues it learn, and embeddings stay."""
    changes = CHANGES | {"iterations": 1, "sft.epochs": 2.0, "sft.learning_rate": 1e-2, "sft.control": True}
    rows = self_play(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path)
    nats = [row["held_out/nats_per_token"] for row in (lora_run[1][0], rows[0], rows[2])]  # untrained, SFT, control
    assert nats[0] > nats[1] + 0.1 and nats[0] > nats[2] + 0.1
    embedding = checkpoints.load(tiny_model)[1]["embed"]["embedding"]
    for stage in ("sft", "iteration_0/control"):
        np.testing.assert_array_equal(checkpoints.load(tmp_path / stage / "model")[1]["embed"]["embedding"], embedding)
