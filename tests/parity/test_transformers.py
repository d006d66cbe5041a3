"""Against transformers itself, live. Needs torch: `pip install torch` and run `pytest tests/parity`."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spin_jax import checkpoints, models
from spin_jax.models.config import LinearRopeScaling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# Without a padding id, whose embedding torch gives no gradient.
GEMMA = TINY | {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24, "pad_token_id": None}
GEMMA_ROPE = {"full_attention": LINEAR | {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}
CONFIGS = {
    "llama2": transformers.LlamaConfig(**TINY | {"num_key_value_heads": 6}),
    "llama3": transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-linear": transformers.LlamaConfig(**TINY, rope_parameters=LINEAR),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=7),
    "mistral-no-window": transformers.MistralConfig(**TINY, sliding_window=None, head_dim=16),
    "qwen2": transformers.Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen2-window": transformers.Qwen2Config(**TINY, use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=32),
    "gemma3": transformers.Gemma3TextConfig(**GEMMA, sliding_window_pattern=2, rope_parameters=GEMMA_ROPE),
    # As the smallest published one has it: no layer but the sixth looks beyond its window.
    "gemma3-defaults": transformers.Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 16}),
    "gemma3-window": transformers.Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 2}),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """A random model of theirs, its directory, and what `checkpoints.load` makes of it."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    norm = 0 if theirs.config.model_type == "gemma3_text" else 1  # what norms start from
    for name, weight in theirs.named_parameters():
        weight.data = (norm if "norm" in name else 0) + 0.3 * torch.randn(weight.shape)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return theirs, directory, *checkpoints.load(directory)


def rows(vocab_size: int, length: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (2, length), dtype=np.int32)


def their_logits(model, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long()).logits.float().numpy()


def our_logits(config, params, tokens_BT: np.ndarray) -> jax.Array:
    return jax.jit(lambda p: models.unembed(config, p, models.forward(config, p, tokens_BT)[0]))(params)


def assert_close(actual, expected: np.ndarray, share: float = 1e-5) -> None:
    """Within a share of the expected values' range."""
    assert np.max(np.abs(actual - expected)) < share * (np.max(expected) - np.min(expected))


def test_logits(pair):
    theirs, _, config, params = pair
    tokens_BT = rows(config.vocab_size)
    assert_close(our_logits(config, params, tokens_BT), their_logits(theirs, tokens_BT))


def test_gradients(pair):
    """Of the mean log-prob of the next tokens, for every tensor in their layout."""
    theirs, directory, config, params = pair
    tokens_BT = rows(config.vocab_size, 24)
    theirs.zero_grad()
    logps = torch.log_softmax(theirs(torch.from_numpy(tokens_BT).long()).logits[:, :-1], dim=-1)
    logps.gather(-1, torch.from_numpy(tokens_BT[:, 1:, None]).long()).mean().backward()
    expected = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}

    def loss(params):
        logps = jax.nn.log_softmax(our_logits(config, params, tokens_BT)[:, :-1])
        return jnp.mean(jnp.take_along_axis(logps, tokens_BT[:, 1:, None], axis=-1))

    gradients = jax.grad(loss)(params)
    checkpoints.save(directory / "gradients", config, gradients, dtype=jnp.float32)
    from safetensors.numpy import load_file

    actual = load_file(directory / "gradients" / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], 1e-4)


def test_saved_models_load_in_transformers(pair, tmp_path):
    theirs, directory, config, params = pair
    tokens_BT = rows(config.vocab_size)
    for name, source in (("fresh", None), ("sourced", directory)):
        checkpoints.save(tmp_path / name, config, params, source=source, dtype=jnp.float32, max_shard_bytes=100_000)
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert type(loaded) is type(theirs) and loaded.dtype == torch.float32
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        np.testing.assert_array_equal(their_logits(loaded, tokens_BT), their_logits(theirs, tokens_BT))
        assert loaded.config.rope_parameters == theirs.config.rope_parameters


def test_linear_scaling_set_by_us_is_read_by_them(tmp_path):
    config = models.ModelConfig.from_huggingface(CONFIGS["llama2"].to_dict(), "x")
    config = dataclasses.replace(config, rope_scaling=LinearRopeScaling(3.0))
    params = models.init_params(config, jax.random.key(0))
    checkpoints.save(tmp_path, config, params, dtype=jnp.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens_BT = rows(config.vocab_size)
    assert_close(our_logits(config, params, tokens_BT), their_logits(theirs, tokens_BT))


@pytest.mark.parametrize("as_mistral", [False, True])
def test_smollm2_logits(smollm2, as_mistral, tmp_path):
    config, params = checkpoints.load(smollm2)
    cls = transformers.LlamaForCausalLM
    if as_mistral:
        config = dataclasses.replace(config, model_type="mistral", sliding_window=16)
        cls = transformers.MistralForCausalLM
    checkpoints.save(tmp_path, config, params, source=smollm2)
    theirs = cls.from_pretrained(tmp_path, dtype=torch.float32)
    # Real text: on random tokens under a window this model is so ill-conditioned that transformers' own f32 logits are
    # 4e-5 of their range away from its f64 ones (2e-5 here, 1e-6 without a window).
    text = pathlib.Path(__file__).read_text()
    tokens_BT = np.asarray([transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"][:160]], np.int32)
    assert_close(our_logits(config, params, tokens_BT), their_logits(theirs, tokens_BT), 1e-4)


def test_greedy_decoding_with_our_cache_is_theirs_with_theirs(assets):
    directory = assets / "models" / "stories260k-hf"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert_decodes_alike(theirs, *checkpoints.load(directory), np.asarray([[1, 403, 407, 261, 378]], np.int32))


def test_greedy_decoding_across_windows_is_theirs(pair):
    theirs, _, config, params = pair
    assert_decodes_alike(theirs, config, params, rows(config.vocab_size, 12)[:1])


def assert_decodes_alike(theirs, config, params, prompt_BT: np.ndarray) -> None:
    asked = torch.from_numpy(prompt_BT).long()
    expected = theirs.generate(asked, max_new_tokens=60, do_sample=False, eos_token_id=None)[0].tolist()

    @jax.jit
    def step(tokens_BT: jax.Array, place: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        return models.forward(config, params, tokens_BT, place[None, None], cache, models.Columns(place))

    cache = models.init_cache(config, 1, 80)
    hidden_BTD, cache = models.forward(config, params, prompt_BT, cache=cache)
    tokens = prompt_BT[0].tolist()
    while len(tokens) < len(expected):
        tokens.append(int(jnp.argmax(models.unembed(config, params, hidden_BTD[0, -1]))))
        hidden_BTD, cache = step(np.asarray([tokens[-1:]], np.int32), jnp.int32(len(tokens) - 1), cache)
    assert tokens == expected
