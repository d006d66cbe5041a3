"""Adapters in PEFT's layout: what is written is what is read, and what cannot be read says so in one line."""

import json
import math
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from spin_jax import checkpoints, models
from spin_jax.checkpoints.directory import hub_name
from spin_jax.config import LoraConfig
from spin_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
LORA = LoraConfig(rank=2, alpha=6.0, target_modules=("q_proj", "o_proj", "down_proj"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spin_jax" / "merged"


def random_adapters(config: models.ModelConfig, lora: LoraConfig = LORA) -> dict:
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
    return jax.tree.map(draw, models.abstract_adapters(config, lora))


@pytest.fixture
def adapter(tmp_path) -> pathlib.Path:
    """Of Llama 2, with random updates."""
    config = checkpoints.read_config(GOLDEN / "llama2")
    directory = tmp_path / "adapter"
    checkpoints.save_adapter(directory, config, LORA, random_adapters(config), base=GOLDEN / "llama2")
    return directory


def change(directory: pathlib.Path, **settings) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensors(directory: pathlib.Path, function) -> None:
    file = directory / "adapter_model.safetensors"
    safetensors.numpy.save_file(function(safetensors.numpy.load_file(file)), file)


def refusal(directory: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        checkpoints.resolve(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "gemma3"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_is_read_is_the_one_that_was_written(family, use_rslora, tmp_path, cache):
    """Merged into its base, whose other weights and tokenizer stay."""
    config, params = checkpoints.load(GOLDEN / family)
    lora = LoraConfig(rank=2, alpha=6.0, use_rslora=use_rslora)
    adapters = random_adapters(config, lora)
    checkpoints.save_adapter(tmp_path / "adapter", config, lora, adapters, base=GOLDEN / family)
    assert checkpoints.describe(tmp_path / "adapter") == config and not cache.exists()
    merged = checkpoints.resolve(tmp_path / "adapter")
    assert merged.parent == cache
    expected = models.merge(params, adapters, lora.scale)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-6),
        checkpoints.load(merged)[1],
        expected,
    )
    np.testing.assert_array_equal(checkpoints.load(merged)[1]["final_norm"], params["final_norm"])


def test_the_merged_model_is_made_once_and_again_for_another_adapter(adapter, cache):
    first = checkpoints.resolve(adapter)
    (first / "config.json").touch()
    time = (first / "config.json").stat().st_mtime_ns
    assert checkpoints.resolve(adapter) == first and (first / "config.json").stat().st_mtime_ns == time
    change(adapter, lora_alpha=7)
    assert checkpoints.resolve(adapter) != first
    assert len(os.listdir(cache)) == 2  # and nothing half made


def test_a_merged_model_that_lost_its_weights_is_made_again(adapter):
    first = checkpoints.resolve(adapter)
    (first / "model.safetensors").unlink()
    assert checkpoints.resolve(adapter) == first and (first / "model.safetensors").is_file()


def test_an_adapter_whose_base_is_itself_is_refused(adapter):
    change(adapter, base_model_name_or_path=str(adapter))
    assert "leads back to itself" in refusal(adapter)


def test_a_directory_with_a_model_and_an_adapter_is_the_model(adapter, caplog):
    shutil.copytree(GOLDEN / "llama2", adapter, dirs_exist_ok=True)
    assert checkpoints.resolve(adapter) == adapter
    assert "holds a model and an adapter: the model is read, and the adapter is not" in caplog.text


def test_an_adapter_of_an_adapter(adapter, tmp_path):
    """Its base is the other one's merged model."""
    config, params = checkpoints.load(checkpoints.resolve(adapter))
    checkpoints.save_adapter(tmp_path / "second", config, LORA, random_adapters(config), base=adapter)
    expected = models.merge(params, random_adapters(config), LORA.scale)
    found = checkpoints.load(checkpoints.resolve(tmp_path / "second"))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=5e-6), found, expected)


def test_the_tokenizer_is_the_adapters_own_if_it_has_one(adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "llama2", base)
    (base / "tokenizer_config.json").write_text('{"of": "the base"}')
    (base / "chat_template.jinja").write_text("the base's")
    change(adapter, base_model_name_or_path=str(base))
    assert json.loads((checkpoints.resolve(adapter) / "tokenizer_config.json").read_text()) == {"of": "the base"}
    (adapter / "tokenizer_config.json").write_text('{"of": "the adapter"}')
    merged = checkpoints.resolve(adapter)
    assert json.loads((merged / "tokenizer_config.json").read_text()) == {"of": "the adapter"}
    assert not (merged / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"peft_type": "LOHA"}, 'peft_type="LOHA" is not supported; merge it into its base with merge_and_unload()'),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save=["lm_head"] is not supported'),
        ({"bias": "all"}, 'bias="all" is not supported'),
        ({"use_dora": True}, "use_dora=true is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, 'rank_pattern={"q_proj": 4} is not supported'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa" is not supported'),
        ({"of_tomorrow": 3}, "of_tomorrow=3 is not supported"),
        ({"r": 0}, "r=0 must be a number above 0"),
        ({"lora_alpha": "16"}, 'lora_alpha="16" must be a number above 0'),
        ({"r": 3}, "lora_A.weight has the shape (2, 32), where r=3 and"),
        ({"lora_alpha": math.inf}, "lora_alpha=Infinity must be a number above 0"),
        ({"use_rslora": "false"}, 'use_rslora="false" must be true or false'),
        ({"base_model_name_or_path": None}, "write the directory or Hub id of its base as base_model_name_or_path"),
        ({"base_model_name_or_path": ["a"]}, "write the directory or Hub id of its base"),
        ({"revision": 5}, "write the directory or Hub id of its base"),
        ({"base_model_name_or_path": "./gone"}, "its base_model_name_or_path: ./gone: no such directory"),
        ({"base_model_name_or_path": str(GOLDEN / "gemma3")}, "ask for (64, 2): not its base?"),
    ],
)
def test_what_is_not_supported_or_does_not_fit_is_refused(adapter, cache, settings, expected):
    change(adapter, **settings)
    told = refusal(adapter)
    assert told.startswith(str(adapter)) and expected in told
    assert not cache.exists()


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda found: dict(list(found.items())[:-1]), "is missing, where r=2"),
        (
            lambda found: found | {"base_model.model.lm_head.weight": np.zeros((64, 32), np.float32)},
            "lm_head.weight is",
        ),
        (lambda found: {}, "there is no update of a linear layer"),
        (lambda found: {name: np.full_like(x, np.nan) for name, x in found.items()}, "is not finite; train it anew"),
    ],
    ids=["half a pair", "a trained head", "nothing", "NaN"],
)
def test_tensors_that_are_no_updates_are_refused(adapter, cache, function, expected):
    change_tensors(adapter, function)
    assert expected in refusal(adapter)
    assert not list(cache.glob("*/config.json"))


def test_weights_that_are_pickled_are_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "has no adapter_model.safetensors; save the adapter with peft anew" in refusal(adapter)


def test_a_base_is_named_as_the_hub_does_or_by_its_whole_path(tmp_path, monkeypatch):
    snapshot = "/home/me/.cache/huggingface/hub/models--someone--tiny-1b/snapshots/0123abc"
    assert hub_name(snapshot) == ("someone/tiny-1b", "0123abc")
    monkeypatch.chdir(tmp_path)
    assert hub_name("some/model") == (str(tmp_path / "some/model"), None)
    assert hub_name("gs://bucket/run/model") == ("gs://bucket/run/model", None)
