"""config.json in and out: read as transformers reads it, and refused by name where it is not what we compute."""

import dataclasses
import json
import pathlib

import pytest

from spin_jax.errors import UserError
from spin_jax.models import ModelConfig
from spin_jax.models.config import LinearRopeScaling

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ["llama2", "llama3", "mistral", "qwen2", "qwen3"]


def source_config(family: str) -> dict:
    return json.loads((GOLDEN / family / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_config_written_is_config_read(family):
    source = source_config(family)
    config = ModelConfig.from_huggingface(source, "x")
    assert ModelConfig.from_huggingface(config.to_huggingface("bfloat16"), "x") == config
    kept = config.to_huggingface("bfloat16", source | {"my_key": "mine"})
    assert ModelConfig.from_huggingface(kept, "x") == config
    assert {key: kept[key] for key in source if key != "dtype"} == {k: v for k, v in source.items() if k != "dtype"}
    assert (kept["my_key"], kept["torch_dtype"]) == ("mine", "bfloat16")


def test_config_written_replaces_what_described_another_model():
    config = ModelConfig.from_huggingface(source_config("llama3"), "x")
    out = config.to_huggingface("float32", source_config("qwen2") | {"eos_token_id": 7})
    assert ModelConfig.from_huggingface(out, "x") == config
    assert (out["model_type"], out["eos_token_id"]) == ("llama", 7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling_key", ["type", "rope_type"])
def test_transformers_4_config_reads_the_same(family, scaling_key):
    source = source_config(family)
    config = ModelConfig.from_huggingface(source, "x")
    rope = source.pop("rope_parameters")
    source["rope_theta"] = rope.pop("rope_theta")
    name = rope.pop("rope_type")
    source["rope_scaling"] = None if name == "default" else {scaling_key: name, **rope}
    source["torch_dtype"] = source.pop("dtype")
    assert ModelConfig.from_huggingface(source, "x") == config


def test_linear_rope_round_trip():
    config = dataclasses.replace(
        ModelConfig.from_huggingface(source_config("llama2"), "x"), rope_scaling=LinearRopeScaling(2.0)
    )
    assert ModelConfig.from_huggingface(config.to_huggingface("float32"), "x") == config


def test_missing_keys_mean_what_they_mean_to_transformers():
    llama2 = ModelConfig.from_huggingface({"model_type": "llama"}, "x")
    assert (llama2.num_kv_heads, llama2.head_dim, llama2.rope_theta, llama2.rms_norm_eps) == (32, 128, 10000.0, 1e-6)
    assert (llama2.sliding_window, llama2.tie_embeddings, llama2.max_position_embeddings) == (None, False, 2048)
    mistral = ModelConfig.from_huggingface({"model_type": "mistral"}, "x")
    assert (mistral.num_kv_heads, mistral.sliding_window, mistral.intermediate_size) == (8, 4096, 14336)
    qwen2 = ModelConfig.from_huggingface({"model_type": "qwen2", "sliding_window": 4096}, "x")
    assert (qwen2.qkv_bias, qwen2.sliding_window, qwen2.num_kv_heads) == (True, None, 32)
    qwen3 = ModelConfig.from_huggingface({"model_type": "qwen3", "hidden_size": 1024}, "x")
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)


def test_qwen_windows_of_all_layers():
    base = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512, "num_hidden_layers": 2}
    window = lambda **changes: ModelConfig.from_huggingface(base | changes, "x").sliding_window  # noqa: E731
    assert window(max_window_layers=0) == 512
    assert window(max_window_layers=2) is None
    assert window(layer_types=["sliding_attention"] * 2) == 512
    assert window(layer_types=["full_attention"] * 2, max_window_layers=0) is None


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "mixtral"}, "model_type='mixtral'"),
        ({"model_type": None}, "model_type=None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": ["llama"]}, "model_type=['llama']"),
        ({"model_type": "qwen2_vl", "vision_config": {}}, "model_type='qwen2_vl'"),
        ({"architectures": 5}, "architectures=5"),
        ({"architectures": {"LlamaForCausalLM": 1}}, "architectures={"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config ('gptq')"),
        ({"quantization_config": "awq"}, "quantization_config ('awq')"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "expected ['factor']"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "of type ['linear']"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": [2.0]}, "rope_scaling=[2.0]"),
        ({"rope_parameters": 2.0}, "rope_parameters=2.0"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "rope_scaling.factor=inf"),
        ({"rope_theta": "10000"}, "rope_theta='10000'"),
        ({"rope_parameters": None, "rope_theta": [1e4]}, "rope_theta=[10000.0]"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"rope_theta": 5e5}, "contradicts"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types mixes"),
        ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"layer_types": 2}, "layer_types=2"),
        ({"layer_types": [["full_attention"]] * 2}, "layer_types=[["),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"hidden_size": 32.0}, "hidden_size=32.0"),
        ({"hidden_size": [32]}, "hidden_size=[32]"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"vocab_size": 10**30}, "must be a positive integer below"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"head_dim": None, "hidden_size": 30}, "hidden_size=30"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, named):
    with pytest.raises(UserError) as error:
        ModelConfig.from_huggingface(source_config("llama2") | change, "here/config.json")
    assert str(error.value).startswith("here/config.json: ") and named in str(error.value)
    assert "\n" not in str(error.value)


def test_qwen_windows_of_some_layers_are_refused_by_name():
    config = source_config("qwen2") | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    del config["layer_types"]
    with pytest.raises(UserError, match="max_window_layers=1 mixes"):
        ModelConfig.from_huggingface(config, "x")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"use_sliding_window": "false"}, "use_sliding_window='false'"),
        ({"max_window_layers": "1"}, "max_window_layers='1'"),
        ({"use_sliding_window": True, "sliding_window": "8", "max_window_layers": 0}, "sliding_window='8'"),
    ],
)
def test_window_options_of_another_type_are_refused_by_name(change, named):
    config = {key: value for key, value in source_config("qwen2").items() if key != "layer_types"}
    with pytest.raises(UserError) as error:
        ModelConfig.from_huggingface(config | change, "x")
    assert named in str(error.value)


@pytest.mark.parametrize("change", [{"torch_dtype": "int3"}, {"dtype": ["float32"]}, {"quantization_config": None}])
def test_what_the_computation_does_not_depend_on_is_not_looked_at(change):
    """A file's tensors have a dtype each, whatever config.json says of them."""
    source = source_config("llama2")
    config = ModelConfig.from_huggingface(source | change, "x")
    assert config == ModelConfig.from_huggingface(source, "x")
    written = config.to_huggingface("float32", source | change)
    assert written["torch_dtype"] == "float32" and "dtype" not in written
