"""Hugging Face directories in and out: nothing lost, nothing guessed, little memory."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax import checkpoints, models
from spin_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ["llama2", "llama3", "mistral", "qwen2", "qwen3", "gemma3"]


@pytest.fixture
def checkpoint(tmp_path) -> pathlib.Path:
    """A small untied model to be damaged."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llama2", directory)
    return directory


def tensors_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, read by the safetensors package."""
    out = {}
    for file in directory.glob("*.safetensors"):
        out |= safetensors.numpy.load_file(file)
    return out


def assert_bit_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype and actual[name].shape == expected[name].shape, name
        assert actual[name].tobytes() == expected[name].tobytes(), name


# ---- Round trips


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_round_trip_is_bit_equal(family, tmp_path):
    config, params = checkpoints.load(GOLDEN / family)
    checkpoints.save(tmp_path, config, params, source=GOLDEN / family, dtype=jnp.float32)
    assert_bit_equal(tensors_of(tmp_path), tensors_of(GOLDEN / family))
    again, reloaded = checkpoints.load(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_round_trip_through_float32_is_bit_equal(dtype, tmp_path):
    shutil.copytree(GOLDEN / "qwen2", tmp_path / "half")
    rounded = {name: tensor.astype(dtype) for name, tensor in tensors_of(GOLDEN / "qwen2").items()}
    safetensors.numpy.save_file(rounded, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    config, params = checkpoints.load(tmp_path / "half", dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    checkpoints.save(tmp_path / "again", config, params, dtype=dtype)
    assert_bit_equal(tensors_of(tmp_path / "again"), rounded)


def test_casts_round_to_nearest(tmp_path):
    config, params = checkpoints.load(GOLDEN / "llama2")
    checkpoints.save(tmp_path, config, params)  # bfloat16 is the default
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors_of(GOLDEN / "llama2").items()}
    assert_bit_equal(tensors_of(tmp_path), rounded)
    _, halved = checkpoints.load(GOLDEN / "llama2", dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, halved, models.cast_params(config, params, jnp.bfloat16))
    assert halved["final_norm"].dtype == jnp.float32 and halved["lm_head"].dtype == jnp.bfloat16


def test_smollm2_round_trip_is_bit_equal(smollm2, tmp_path):
    config, params = checkpoints.load(smollm2)
    assert models.num_params(config) == 134_515_008
    checkpoints.save(tmp_path, config, params, source=smollm2)
    assert_bit_equal(tensors_of(tmp_path), tensors_of(smollm2))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (smollm2 / file).read_bytes()
    source, saved = (json.loads((path / "config.json").read_text()) for path in (smollm2, tmp_path))
    assert {key: saved[key] for key in source} == source


# ---- Several files, several devices, little memory


def test_shards_are_indexed_and_within_their_size(tmp_path):
    config, params = checkpoints.load(GOLDEN / "mistral")
    checkpoints.save(tmp_path, config, params, dtype=jnp.float32, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        tensors = safetensors.numpy.load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        assert all(index["weight_map"][name] == file for name in tensors)
    assert_bit_equal(tensors_of(tmp_path), tensors_of(GOLDEN / "mistral"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path).values())
    _, reloaded = checkpoints.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)


def test_saving_again_leaves_nothing_of_the_older_model(tmp_path):
    config, params = checkpoints.load(GOLDEN / "mistral")
    checkpoints.save(tmp_path, config, params, max_shard_bytes=20_000)
    checkpoints.save(tmp_path, config, params)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    checkpoints.save(tmp_path, config, params, max_shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    checkpoints.load(tmp_path)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sharded_load_and_save_equal_unsharded(family, tmp_path):
    config, expected = checkpoints.load(GOLDEN / family)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rules = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    shardings = jax.tree.map(
        lambda _, axes: NamedSharding(mesh, PartitionSpec(*map(rules.get, axes))),
        models.abstract_params(config),
        models.logical_axes(config),
    )
    _, params = checkpoints.load(GOLDEN / family, shardings=shardings)
    assert params["layers"]["attention"]["q"].addressable_shards[0].data.shape == (2, 16, 2, 8)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    checkpoints.save(tmp_path, config, params, dtype=jnp.float32)
    assert_bit_equal(tensors_of(tmp_path), tensors_of(GOLDEN / family))


_MEASURE = """
import json, pathlib, re, sys
import jax, jax.numpy as jnp
from spin_jax import checkpoints
# Not getrusage: its maximum includes what the parent held when it started this process.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
jnp.zeros(()).block_until_ready()
checkpoints.read_config(sys.argv[1])  # transformers is imported for it, which takes what it takes
before = peak()
config, params = checkpoints.load(sys.argv[1])
jax.block_until_ready(params)
loaded = peak()
checkpoints.save(sys.argv[2], config, params)
print(json.dumps({"load": loaded - before, "save": peak() - loaded}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_params_and_one_of_them(tmp_path):
    config = dataclasses.replace(
        checkpoints.load(GOLDEN / "llama2")[0],
        hidden_size=512,
        intermediate_size=1536,
        num_layers=12,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=8192,
    )
    params = jax.jit(lambda key: models.init_params(config, key, jnp.bfloat16))(jax.random.key(0))
    checkpoints.save(tmp_path / "model", config, params)
    size = 4 * models.num_params(config)
    largest = max(4 * x.size for x in jax.tree.leaves(params))
    assert size > 170e6 and largest < size / 4  # so that a second copy of the params would show
    del params
    command = [sys.executable, "-c", _MEASURE, tmp_path / "model", tmp_path / "saved"]
    grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    slack = 30e6  # the interpreter's own: code, compiled casts, allocator
    assert grown["load"] < size + largest + slack
    assert grown["save"] < largest + slack


# ---- What stands beside the weights


def test_tokenizer_and_token_ids_travel(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama2", source)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"):
        (source / name).write_text(name)
    (source / "README.md").write_text("about the source, not about what becomes of it")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.6}')
    config, params = checkpoints.load(source)
    checkpoints.save(tmp_path / "kept", config, params, source=source)
    kept = tmp_path / "kept"
    assert (kept / "tokenizer.model").read_text() == "tokenizer.model"
    assert (kept / "chat_template.jinja").exists() and not (kept / "README.md").exists()
    generation = json.loads((kept / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["temperature"]) == ([2, 5], 0.6)

    checkpoints.save(tmp_path / "patched", config, params, source=source, token_ids={"eos_token_id": 3})
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "patched" / name).read_text())["eos_token_id"] == 3
    checkpoints.save(tmp_path / "bare", config, params, token_ids={"eos_token_id": 3})
    assert json.loads((tmp_path / "bare" / "generation_config.json").read_text()) == {"eos_token_id": 3}


def test_an_interrupted_save_is_not_a_model(tmp_path):
    config, params = checkpoints.load(GOLDEN / "llama2")
    checkpoints.save(tmp_path, config, params)
    with pytest.raises(KeyError):
        checkpoints.save(tmp_path, config, {key: value for key, value in params.items() if key != "layers"})
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(UserError, match="config.json: not found"):
        checkpoints.load(tmp_path)


def test_refused_saves(tmp_path):
    config, params = checkpoints.load(GOLDEN / "llama2")
    with pytest.raises(UserError, match="would overwrite"):
        checkpoints.save(GOLDEN / "llama2", config, params, source=GOLDEN / "llama2")
    with pytest.raises(UserError, match="int8"):
        checkpoints.save(tmp_path, config, params, dtype=jnp.int8)


# ---- Damaged or foreign checkpoints


def rewrite(directory: pathlib.Path, change) -> None:
    tensors = tensors_of(directory)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def refusal(directory: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        checkpoints.load(directory)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)
    return str(error.value)


def test_missing_tensors_are_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in refusal(checkpoint)


def test_missing_lm_head_suggests_tying(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    assert "tie_word_embeddings to true" in refusal(checkpoint)


def test_unexpected_tensors_are_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.extra": np.zeros(3, np.float32)}))
    assert "tensor model.layers.0.extra is not part" in refusal(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text()) | {"num_hidden_layers": 1}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "and 9 others are not part" in refusal(checkpoint)


def test_wrong_shapes_are_named(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text()) | {"num_key_value_heads": 2}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "k_proj.weight has the shape (32, 32); config.json says (16, 32)" in refusal(checkpoint)


def test_constant_rotary_frequencies_are_no_weights(checkpoint):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
    checkpoints.load(checkpoint)


def test_tied_lm_head_must_be_the_embedding(tmp_path):
    directory = tmp_path / "tied"
    shutil.copytree(GOLDEN / "llama3", directory)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    _, params = checkpoints.load(directory)
    assert "lm_head" not in params
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    assert "tie_word_embeddings to false" in refusal(directory)


def test_quantised_weights_are_refused(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(ml_dtypes.float8_e4m3fn)}))
    assert "lm_head.weight is stored as F8_E4M3" in refusal(checkpoint)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_weight_that_is_not_finite_is_named(checkpoint, name, value, stored, dtype):
    def spoil(tensors):
        tensors |= {key: tensor.astype(stored) for key, tensor in tensors.items()}
        tensors[name].flat[tensors[name].size // 2] = value

    rewrite(checkpoint, spoil)
    with pytest.raises(UserError, match=f"model.safetensors: {name} holds values that are not finite") as error:
        checkpoints.load(checkpoint, dtype=dtype)
    assert "\n" not in str(error.value) and "learning_rate" not in str(error.value)


def test_a_weight_beyond_the_dtype_it_is_loaded_in_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors["lm_head.weight"].fill(-1e5))
    checkpoints.load(checkpoint, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match="lm_head.weight holds values that are not finite in float16"):
        checkpoints.load(checkpoint, dtype=jnp.float16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_and_smallest_weights_are_finite(checkpoint, dtype):
    limits = ml_dtypes.finfo(dtype)
    extremes = np.array([limits.max, limits.min, limits.tiny, limits.smallest_subnormal, -0.0, 0.0], np.float64)

    def fill(tensors):
        tensors |= {key: tensor.astype(dtype) for key, tensor in tensors.items()}
        tensors["lm_head.weight"] = np.resize(extremes, tensors["lm_head.weight"].shape).astype(dtype)

    rewrite(checkpoint, fill)
    _, params = checkpoints.load(checkpoint, dtype=dtype)
    np.testing.assert_array_equal(params["lm_head"].T, tensors_of(checkpoint)["lm_head.weight"])


def test_of_a_tensor_on_several_devices_each_part_is_looked_at(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors["lm_head.weight"].__setitem__((-1, -1), np.nan))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = models.abstract_params(checkpoints.read_config(checkpoint))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    shardings["lm_head"] = NamedSharding(mesh, PartitionSpec("x"))
    with pytest.raises(UserError, match="lm_head.weight holds values that are not finite"):
        checkpoints.load(checkpoint, shardings=shardings)


def test_a_tied_head_that_is_not_finite_is_not_called_untied(tmp_path):
    directory = shutil.copytree(GOLDEN / "llama3", tmp_path / "tied")
    rewrite(directory, lambda tensors: tensors["model.embed_tokens.weight"].__setitem__((1, 1), np.nan))
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    assert "model.embed_tokens.weight holds values that are not finite" in refusal(directory)
