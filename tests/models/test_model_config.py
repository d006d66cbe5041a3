"""config.json in and out: read as transformers reads it, and refused by name where it is not what we compute."""

import dataclasses
import json
import pathlib

import pytest

from spin_jax.errors import UserError
from spin_jax.models import ModelConfig
from spin_jax.models.config import LinearRopeScaling

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ["llama2", "llama3", "mistral", "qwen2", "qwen3", "gemma3"]


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
    if family == "gemma3":
        scaling_key = "rope_type"  # Gemma 3 came after the older key
        source["rope_local_base_freq"], rope = rope["sliding_attention"]["rope_theta"], rope["full_attention"]
        del source["layer_types"]  # sliding_window_pattern says the same
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


def gemma(**changes) -> ModelConfig:
    return ModelConfig.from_huggingface({"model_type": "gemma3_text", "num_hidden_layers": 8} | changes, "x")


def test_gemmas_layers_of_two_kinds():
    """Every sixth sees all tokens where the config says nothing else."""
    config = gemma()
    assert config.windows == (4096,) * 5 + (None,) + (4096,) * 2
    assert (config.rope_theta, config.local_rope_theta, config.head_dim) == (1e6, 1e4, 256)
    assert (config.tie_embeddings, config.query_pre_attn_scalar) == (True, 256)
    assert gemma(sliding_window_pattern=2, sliding_window=512).windows == (512, None) * 4
    assert gemma(layer_types=["sliding_attention", "full_attention"] * 4).windows == (4096, None) * 4
    assert gemma(num_hidden_layers=5).windows == (4096,) * 5
    assert set(gemma(layer_types=["full_attention"] * 8).windows) == {None}
    scaled = {"rope_type": "linear", "factor": 8.0}
    assert gemma(rope_scaling=scaled).rope_scaling == LinearRopeScaling(8.0)
    assert gemma(rope_theta=5e5, rope_local_base_freq=2e4).local_rope_theta == 2e4
    assert gemma(rope_parameters={"full_attention": scaled, "sliding_attention": {"rope_type": "default"}}) == gemma(
        rope_scaling=scaled
    )


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gemma3", "vision_config": {}}, "gemma3_text; name a model of text alone"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu' is not supported, only 'gelu_pytorch_tanh' is"),
        ({"layer_types": ["full_attention"] + ["sliding_attention"] * 7}, "full attention in layers [0]"),
        ({"layer_types": ["sliding_attention", "chunked_attention"] * 4}, "chunked_attention"),
        ({"sliding_window": None}, "sliding_window=None"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            "scaled rotations in layers with a sliding window",
        ),
    ],
)
def test_gemmas_that_are_not_computed_are_refused_by_name(change, named):
    with pytest.raises(UserError) as error:
        gemma(**change)
    assert named in str(error.value) and "\n" not in str(error.value)


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
        ({"rope_scaling": {"type": "linear"}}, "'factor'"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_type=['linear']"),
        ({"rope_scaling": "linear"}, "'linear'"),
        ({"rope_scaling": [2.0]}, "[2.0]"),
        ({"rope_parameters": 2.0}, "'rope_parameters' with value 2.0"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "rope_parameters.factor=inf"),
        ({"rope_theta": "10000"}, "rope_theta='10000'"),
        ({"rope_parameters": None, "rope_theta": [1e4]}, "rope_theta=[10000.0]"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_parameters.factor='2'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"rope_theta": 5e5}, "contradicts"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full_attention and sliding_attention"),
        ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"layer_types": 2}, "layer_types=2"),
        ({"layer_types": [["full_attention"]] * 2}, "layer_types=[["),
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str (value: '32')"),
        ({"hidden_size": 32.0}, "'hidden_size' expected int, got float"),
        ({"hidden_size": [32]}, "'hidden_size' expected int, got list"),
        ({"hidden_size": True}, "'hidden_size' expected int, got bool"),
        ({"vocab_size": None}, "'vocab_size' expected int, got NoneType"),
        ({"vocab_size": 10**30}, "must be a positive integer below"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": 10**400}, "'rms_norm_eps' expected float, got int"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' expected float, got str"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' expected bool, got str"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 7}, "`head_dim`=7"),
        ({"head_dim": None, "hidden_size": 30}, "hidden size (30)"),
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
    with pytest.raises(UserError, match=r"full attention in layers \[0\]"):
        ModelConfig.from_huggingface(config, "x")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"use_sliding_window": "false"}, "'use_sliding_window' expected bool, got str"),
        ({"max_window_layers": "1"}, "'max_window_layers' expected int, got str"),
        (
            {"use_sliding_window": True, "sliding_window": "8", "max_window_layers": 0},
            "'sliding_window' with value '8'",
        ),
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
