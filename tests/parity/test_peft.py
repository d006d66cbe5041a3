"""Adapters against Hugging Face's PEFT itself, live. Needs torch and peft: `pip install peft` and run `pytest
tests/parity`."""

import pathlib

import jax
import numpy as np
import pytest

from spin_jax import checkpoints, models
from spin_jax.config import LoraConfig

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
SUBSET = ("q_proj", "v_proj", "o_proj", "down_proj")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def their_model(family: str):
    return transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / family, dtype=torch.float32).eval()


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT(model.config.vocab_size)).long()).logits.numpy()


def our_logits(config: models.ModelConfig, params: dict) -> jax.Array:
    tokens = tokens_BT(config.vocab_size)
    return jax.jit(lambda p: models.unembed(config, p, models.forward(config, p, tokens)[0]))(params)


def tokens_BT(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (2, 24), dtype=np.int32)


def assert_close(actual, expected) -> None:
    """Within 1e-5 of the expected values' range."""
    assert np.max(np.abs(actual - expected)) < 1e-5 * (np.max(expected) - np.min(expected))


@pytest.mark.parametrize(
    "family, lora",
    [
        ("llama2", LoraConfig(rank=3, alpha=2.0)),
        ("qwen2", LoraConfig(rank=3, alpha=2.0, use_rslora=True, dropout=0.3)),
        ("gemma3", LoraConfig(rank=4, alpha=2.0, target_modules=SUBSET)),
    ],
    ids=["llama2", "qwen2-rslora", "gemma3-subset"],
)
def test_our_adapter_in_peft(family, lora, tmp_path):
    """Its logits are ours with the updates attached, and those of our merged model."""
    config, params = checkpoints.load(GOLDEN / family)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), models.abstract_adapters(config, lora)
    )
    checkpoints.save_adapter(tmp_path / "adapter", config, lora, adapters, base=GOLDEN / family)
    base = their_model(family)
    before = their_logits(base)
    theirs = their_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert np.max(np.abs(theirs - before)) > 0.1 * np.ptp(before)
    assert_close(our_logits(config, models.attach(params, adapters, lora.scale)), theirs)
    assert_close(our_logits(config, models.merge(params, adapters, lora.scale)), theirs)
    # PEFT finds the base by itself, too.
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert_close(their_logits(found), theirs)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family, targets", [("llama2", SUBSET), ("gemma3", "all-linear"), ("qwen3", ("k_proj",))])
def test_their_adapter_as_a_start(family, targets, use_rslora, tmp_path):
    """It is the model that merge_and_unload() of PEFT makes."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=use_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        init_lora_weights=False,  # random, B too
        lora_dropout=0.1,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(their_model(family), settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    config, params = checkpoints.load(checkpoints.resolve(tmp_path / "adapter"))
    merged = model.merge_and_unload()
    assert_close(our_logits(config, params), their_logits(merged))
    checkpoints.save(tmp_path / "ours", config, params, dtype=np.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
    for name, weight in merged.state_dict().items():
        np.testing.assert_allclose(ours[name], weight, rtol=1e-6, atol=1e-6, err_msg=name)
