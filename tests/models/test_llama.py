"""The Flax models: against transformers' golden logits, and against themselves by other routes."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax import checkpoints, models
from spin_jax.models import REMAT_POLICIES, Columns, Execution, ModelConfig, llama
from spin_jax.models.config import LinearRopeScaling, Llama3RopeScaling
from spin_jax.models.rope import apply_rope, rope_frequencies, rope_tables
from spin_jax.models.weights import weights

BFLOAT16 = Execution(jnp.dtype(jnp.bfloat16))
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ["llama2", "llama3", "mistral", "qwen2", "qwen3", "gemma3"]


def golden(family: str) -> tuple[ModelConfig, dict, np.ndarray, np.ndarray]:
    """(config, params, tokens_BT, transformers' logits_BTV)"""
    arrays = np.load(GOLDEN / family / "golden.npz")
    return *checkpoints.load(GOLDEN / family), arrays["tokens"], arrays["logits"]


def source_config(family: str) -> dict:
    return json.loads((GOLDEN / family / "config.json").read_text())


# Jitted, as the package uses them; it also makes these tests several times faster.
forward = jax.jit(models.forward, static_argnames=("config", "execution"))
init_params = jax.jit(models.init_params, static_argnames=("config", "dtype"))


def logits_of(config: ModelConfig, params: dict, tokens_BT: np.ndarray, **kwargs) -> jax.Array:
    return models.unembed(config, params, forward(config, params, tokens_BT, **kwargs)[0])


def error_of(actual: jax.Array, expected: np.ndarray) -> float:
    """max |difference| as a share of the expected values' range"""
    return float(np.max(np.abs(actual - expected)) / (np.max(expected) - np.min(expected)))


# ---- Against transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family):
    config, params, tokens_BT, expected_BTV = golden(family)
    actual_BTV = logits_of(config, params, tokens_BT)
    assert actual_BTV.dtype == jnp.float32
    assert error_of(actual_BTV, expected_BTV) < 1e-5


@pytest.mark.parametrize(
    "family, change",
    [
        ("llama3", {"rope_scaling": None}),
        ("llama3", {"rope_scaling": LinearRopeScaling(8.0)}),
        ("llama2", {"rope_theta": 9000.0}),
        ("llama2", {"rms_norm_eps": 1e-2}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"qkv_bias": False}),
        ("qwen3", {"qk_norm": False}),
        ("gemma3", {"full_attention_every": None}),
        ("gemma3", {"full_attention_every": 2}),
        ("gemma3", {"sliding_window": 5}),
        ("gemma3", {"local_rope_theta": 1e6}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"query_pre_attn_scalar": None}),
        ("gemma3", {"activation": "silu"}),
        ("gemma3", {"scale_embeddings": False}),
        ("gemma3", {"post_norms": False}),
        ("gemma3", {"norm_offset": 0.0}),
    ],
)
def test_golden_logits_would_show_a_feature_left_out(family, change):
    config, params, tokens_BT, expected_BTV = golden(family)
    config = dataclasses.replace(config, **change)

    def without(params: dict, table: dict) -> dict:
        return {k: without(params[k], table[k]) if isinstance(table[k], dict) else params[k] for k in table}

    assert error_of(logits_of(config, without(params, weights(config)), tokens_BT), expected_BTV) > 1e-3


@pytest.mark.parametrize("variant", ["llama", "mistral", "window"])
def test_smollm2_matches_transformers(smollm2, variant, tmp_path):
    golden = np.load(GOLDEN / "smollm2.npz")
    source = json.loads((smollm2 / "config.json").read_text())
    if variant != "llama":
        source |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        source |= {"sliding_window": 8 if variant == "window" else None}
    (tmp_path / "config.json").write_text(json.dumps(source))
    (tmp_path / "model.safetensors").symlink_to(smollm2 / "model.safetensors")
    config, params = checkpoints.load(tmp_path)

    @jax.jit
    def last_logits(params):
        hidden_BTD, _ = models.forward(config, params, golden["tokens"])
        return models.unembed(config, params, hidden_BTD[0, -8:])

    logits_TV = last_logits(params)
    assert np.max(np.abs(logits_TV[:, ::32] - golden[variant])) < 1e-4 * golden[f"{variant}_range"]
    np.testing.assert_allclose(jax.nn.logsumexp(logits_TV, axis=-1), golden[f"{variant}_logsumexp"], atol=1e-4)


# ---- One computation by two routes


@pytest.mark.parametrize("keys", ["k", "kT", "kT by layer"])  # of TPUs and GPUs, of CPUs, and of one CPU
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3", "gemma3"])
def test_cache_gives_the_uncached_hidden_states(family, keys):
    """Rows with prompts of different lengths: one right-padded prefill, then each row goes on from its own position."""
    config, params, tokens_BT, _ = golden(family)
    expected_BTD, _ = forward(config, params, tokens_BT)
    prompt_lengths_B, slots = np.asarray([9, 5]), 24

    keys, _, by_layer = keys.partition(" ")
    cache = models.init_cache(config, 2, slots, by_layer=bool(by_layer))
    if by_layer:
        params = models.split_layers(params)
    elif keys not in cache:
        cache[keys] = cache.pop("kT" if keys == "k" else "k").swapaxes(3, 4)
    # What an earlier use left behind must not matter.
    cache |= jax.tree.map(lambda x: x + 100.0, {name: cache[name] for name in (keys, "v")})
    positions_BT = np.where(np.arange(9) < prompt_lengths_B[:, None], np.arange(9), models.EMPTY_POSITION)
    prefill_BTD, cache = forward(config, params, tokens_BT[:, :9], positions_BT, cache)
    for row, length in enumerate(prompt_lengths_B):
        np.testing.assert_allclose(prefill_BTD[row, :length], expected_BTD[row, :length], atol=2e-5)
    for offset in range(8):
        positions_BT = (prompt_lengths_B + offset)[:, None]
        next_BT = np.take_along_axis(tokens_BT, positions_BT, axis=1)
        hidden_BTD, cache = forward(config, params, next_BT, positions_BT, cache, Columns(9 + offset))
        expected = np.take_along_axis(np.asarray(expected_BTD), positions_BT[..., None], axis=1)
        np.testing.assert_allclose(hidden_BTD, expected, atol=2e-5)


def test_cache_is_written_where_its_rows_live():
    """Decoding with rows split over devices and heads over others moves activations only, never a part of the cache."""
    config, params, _, _ = golden("llama2")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    cache_sharding = NamedSharding(mesh, PartitionSpec(None, "data", "tensor"))
    tensor_axes = {"heads", "kv_heads", "mlp"}
    params = jax.tree.map(
        lambda x, axes: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(*("tensor" if axis in tensor_axes else None for axis in axes)))
        ),
        params,
        models.logical_axes(config),
    )
    cache = models.init_cache(config, 8, 16)
    shardings = {name: rows if name == "positions" else cache_sharding for name in cache}
    cache = jax.device_put(cache, shardings)
    tokens_BT, positions_BT = jax.device_put((np.ones((8, 1), np.int32), np.arange(8, dtype=np.int32)[:, None]), rows)
    step = jax.jit(
        lambda params, tokens, positions, cache: models.forward(config, params, tokens, positions, cache),
        donate_argnums=3,
        out_shardings=(rows, shardings),
    )
    program = step.lower(params, tokens_BT, positions_BT, cache).compile().as_text()
    assert "all-reduce(" in program  # of the attention and mlp outputs over "tensor"
    for collective in ("all-gather(", "all-to-all(", "collective-permute("):
        assert collective not in program


def test_remat_changes_no_gradient():
    config, params, tokens_BT, _ = golden("qwen2")

    def gradient(remat):
        def loss(params):
            return jnp.mean(jnp.square(logits_of(config, params, tokens_BT, execution=Execution(remat=remat))))

        return jax.jit(jax.grad(loss))(params)

    expected = gradient("none")
    for remat in REMAT_POLICIES.keys() - {"none"}:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient(remat), expected)


@pytest.mark.parametrize("family", ["llama2", "gemma3"])
def test_remat_policies_save_what_they_say(family):
    config, params, tokens_BT, _ = golden(family)

    def residual_bytes(remat):
        hidden = lambda params: models.forward(config, params, tokens_BT, execution=Execution(remat=remat))[0]  # noqa: E731
        _, backward = jax.eval_shape(lambda params: jax.vjp(hidden, params), params)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(backward))

    layers, tokens = config.num_layers, tokens_BT.size
    # The plain path has no result of a kernel.
    kernel = {"attention": 1, "gate": 1, "mlp": 1}
    for policy in REMAT_POLICIES.keys() - {"none"}:
        numbers = models.saved_numbers(config, policy) - models.saved_numbers(config, "full")
        numbers -= kernel.get(policy, 0) * config.num_heads * config.head_dim
        assert residual_bytes(policy) - residual_bytes("full") == 4 * layers * tokens * numbers, policy
    assert residual_bytes("mlp") < residual_bytes("none")


def test_scan_over_stacked_layers_is_a_loop_over_layers():
    config, params, tokens_BT, _ = golden("qwen3")
    table = weights(config)["layers"]
    make = functools.partial(llama.DecoderLayer, config, Execution(), table, dtype=jnp.float32)
    abstract_layer = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    layer_def = nnx.split(abstract_layer)[0]
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    tokens = llama.Tokens(rope_tables(config, positions_BT), jnp.broadcast_to(positions_BT, tokens_BT.shape))
    x_BTD = params["embed"]["embedding"][tokens_BT]
    for layer in range(config.num_layers):
        one = nnx.merge(layer_def, jax.tree.map(lambda x, layer=layer: x[layer], params["layers"]))
        x_BTD, _ = one(x_BTD, tokens, None, layer)
    looped_BTD = llama.rms_norm(x_BTD, params["final_norm"], config.rms_norm_eps, Execution())
    np.testing.assert_allclose(forward(config, params, tokens_BT)[0], looped_BTD, atol=2e-5)


def test_a_token_sees_its_window_and_no_more():
    config, params, tokens_BT, _ = golden("mistral")  # window 4, two layers: six tokens back at most
    changed_BT = tokens_BT.copy()
    changed_BT[:, 10] = (changed_BT[:, 10] + 1) % config.vocab_size
    before_BTD, after_BTD = (forward(config, params, x)[0] for x in (tokens_BT, changed_BT))
    differs_T = np.any(np.asarray(before_BTD != after_BTD), axis=(0, 2))
    assert list(np.flatnonzero(differs_T)) == list(range(10, 17))


def test_bfloat16_compute_is_close_and_keeps_its_dtypes():
    config, params, tokens_BT, expected_BTV = golden("llama3")
    hidden_BTD, cache = forward(
        config, params, tokens_BT, cache=models.init_cache(config, 2, 20, jnp.bfloat16), execution=BFLOAT16
    )
    assert hidden_BTD.dtype == jnp.bfloat16 and cache["v"].dtype == jnp.bfloat16
    logits_BTV = models.unembed(config, params, hidden_BTD)
    assert logits_BTV.dtype == jnp.float32
    assert 1e-5 < error_of(logits_BTV, expected_BTV) < 0.05  # bfloat16 has 8 bits


# ---- Rotary embeddings in closed form


def test_linear_rope_divides_every_frequency():
    config = ModelConfig.from_huggingface(source_config("llama2"), "x")
    plain = rope_frequencies(config)
    np.testing.assert_allclose(plain, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    scaled = rope_frequencies(dataclasses.replace(config, rope_scaling=LinearRopeScaling(4.0)))
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


def test_llama3_rope_of_the_published_model():
    """Llama 3.1 8B: theta 5e5, head_dim 128, factor 8 between the wavelengths 8192 / 4 and 8192 / 1."""
    config = dataclasses.replace(
        ModelConfig.from_huggingface(source_config("llama2"), "x"),
        head_dim=128,
        rope_theta=500000.0,
        rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
    )
    scaled = rope_frequencies(config)
    assert scaled.shape == (64,) and scaled.dtype == np.float32
    for i, frequency in enumerate(scaled):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 2048:
            expected = plain
        elif wavelength > 8192:
            expected = plain / 8
        else:  # linear in the number of turns, from 1/8 at one turn to 1 at four
            expected = plain * (1 / 8 + 7 / 8 * (8192 / wavelength - 1) / 3)
        assert frequency == pytest.approx(expected, rel=2e-6), i


def test_rope_scores_depend_on_the_distance_alone():
    config = ModelConfig.from_huggingface(source_config("qwen3"), "x")
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, config.head_dim))

    def score(query_position, key_position):
        tables = (rope_tables(config, jnp.asarray([[p]])) for p in (query_position, key_position))
        return float(jnp.sum(apply_rope(q, *next(tables)) * apply_rope(k, *next(tables))))

    assert score(17, 5) == pytest.approx(score(112, 100), abs=1e-4)
    assert abs(score(17, 5) - score(18, 5)) > 1e-2


# ---- Params, counts and sharding of them


@pytest.mark.parametrize("family", FAMILIES)
def test_init_params_have_the_promised_tree(family):
    config = ModelConfig.from_huggingface(source_config(family), "x")
    params = jax.eval_shape(lambda key: models.init_params(config, key, jnp.bfloat16), jax.random.key(0))
    abstract = models.abstract_params(config, jnp.bfloat16)
    assert jax.tree.structure(params) == jax.tree.structure(abstract) == jax.tree.structure(golden(family)[1])
    assert type(params) is dict and type(params["layers"]["mlp"]) is dict

    def check(param, expected, axes):
        assert (param.shape, param.dtype) == (expected.shape, expected.dtype)
        assert len(axes) == param.ndim

    jax.tree.map(check, params, abstract, models.logical_axes(config))
    assert models.num_params(config) == sum(x.size for x in jax.tree.leaves(params))


def test_init_params_draw_every_layer_anew():
    config = ModelConfig.from_huggingface(source_config("llama2"), "x")
    params = init_params(config, jax.random.key(0))
    up_LDF = params["layers"]["mlp"]["up"]
    assert float(jnp.std(up_LDF)) == pytest.approx(0.02, rel=0.1)
    assert not np.any(up_LDF[0] == up_LDF[1])
    assert np.all(params["layers"]["attention_norm"] == 1)
    assert not np.array_equal(init_params(config, jax.random.key(1))["layers"]["mlp"]["up"], up_LDF)


def test_init_params_are_born_sharded():
    config = ModelConfig.from_huggingface(source_config("llama2"), "x")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(
        lambda _, axes: NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == "embed" else None for axis in axes))),
        models.abstract_params(config),
        models.logical_axes(config),
    )
    params = jax.jit(lambda key: models.init_params(config, key), out_shardings=shardings)(jax.random.key(0))
    assert params["layers"]["mlp"]["gate"].addressable_shards[0].data.shape == (2, 4, 48)
    expected = init_params(config, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)


def test_logical_axes_of_untied_grouped_attention():
    axes = models.logical_axes(ModelConfig.from_huggingface(source_config("mistral"), "x"))
    assert axes["layers"]["attention"]["q"] == ("layers", "embed", "heads", "head_dim")
    assert axes["layers"]["attention"]["v"] == ("layers", "embed", "kv_heads", "head_dim")
    assert axes["layers"]["attention"]["o"] == ("layers", "heads", "head_dim", "embed")
    assert axes["layers"]["mlp"]["down"] == ("layers", "mlp", "embed")
    assert axes["layers"]["mlp_norm"] == ("layers", None)
    assert (axes["embed"]["embedding"], axes["lm_head"]) == (("vocab", "embed"), ("embed", "vocab"))


def test_published_parameter_counts():
    llama2_7b = ModelConfig.from_huggingface({"model_type": "llama"}, "x")
    assert models.num_params(llama2_7b) == 6_738_415_616
    qwen2 = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    qwen2 |= {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True}
    assert models.num_params(ModelConfig.from_huggingface(qwen2, "x")) == 494_032_768  # Qwen2-0.5B


@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_flops_are_those_of_the_traced_program(family):
    config, params, tokens_BT, _ = golden(family)
    length = tokens_BT.shape[1]

    def matmul_flops(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
                total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            for inner in equation.params.values():
                if hasattr(inner, "jaxpr"):
                    total += equation.params.get("length", 1) * matmul_flops(inner.jaxpr)
        return total

    hidden = jax.make_jaxpr(lambda: models.forward(config, params, tokens_BT, execution=Execution(remat="none"))[0])()
    # The program computes every score and masks; the formula counts those it is told of.
    asked = tokens_BT.size * models.flops_per_token(config, length)
    # The permutation inside a rotation is how it is done, not what the model asks for.
    rotated = config.num_layers * (config.num_heads + config.num_kv_heads) * config.head_dim
    assert matmul_flops(hidden.jaxpr) == asked + tokens_BT.size * 2 * rotated * config.head_dim
    logits = jax.make_jaxpr(lambda x: models.unembed(config, params, x))(jnp.ones((3, config.hidden_size)))
    assert matmul_flops(logits.jaxpr) == 3 * models.unembed_flops(config)
