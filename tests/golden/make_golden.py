"""Writes the golden files beside it: what transformers computes, for tests that must run without torch.

    python tests/golden/make_golden.py [--smollm2 DIRECTORY]

needs torch and transformers 5. Each family gets a tiny random model (a directory as `save_pretrained` writes it), token
rows and their f32 logits; SmolLM2 gets a sample of its logits on one conversation, plain and under a sliding window.
"""

import argparse
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Puts the four wavelengths of a head (6, 63, 628, 6283 tokens) on all three sides of the two thresholds.
    "original_max_position_embeddings": 128,
}
FAMILIES = {
    "llama2": transformers.LlamaConfig(**TINY | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=4),
    "qwen2": transformers.Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=16),
    # Five layers, of which the third sees beyond its window of four tokens and turns by other, stretched angles.
    "gemma3": transformers.Gemma3TextConfig(
        **TINY | {"num_hidden_layers": 5, "head_dim": 16, "query_pre_attn_scalar": 24},
        sliding_window=4,
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital of France is Paris."
)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough, and norms and biases far enough from 1 and 0, that leaving any of them out shows."""
    generator = torch.Generator().manual_seed(seed)
    norm = 0 if model.config.model_type == "gemma3_text" else 1
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = norm + 0.3 * noise if "norm" in name else 0.3 * noise


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def make_tiny() -> None:
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 20), dtype=np.int32)
    for seed, (family, config) in enumerate(FAMILIES.items()):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomise(model, seed)
        model.save_pretrained(HERE / family)
        np.savez(HERE / family / "golden.npz", tokens=tokens, logits=logits_of(model, tokens))


def make_smollm2(directory: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokens = np.asarray([tokenizer(PROMPT, add_special_tokens=False)["input_ids"]], np.int32)
    golden = {"tokens": tokens}
    base = transformers.AutoConfig.from_pretrained(directory).to_dict()
    base = {key: base[key] for key in (*TINY, "rms_norm_eps", "rope_parameters", "tie_word_embeddings")}
    configs = {
        "llama": transformers.LlamaConfig(**base),
        "mistral": transformers.MistralConfig(**base, sliding_window=None),
        "window": transformers.MistralConfig(**base, sliding_window=8),
    }
    for name, config in configs.items():
        cls = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        model = cls.from_pretrained(directory, config=config, dtype=torch.float32, attn_implementation="eager").eval()
        logits = logits_of(model, tokens)[0, -8:]
        golden[name] = logits[:, ::32]  # every 32nd token keeps the file small; the normaliser sees them all
        golden[f"{name}_logsumexp"] = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
        golden[f"{name}_range"] = logits.max() - logits.min()
    np.savez(HERE / "smollm2.npz", **golden)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", help="a Hugging Face directory of SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    make_tiny()
    if arguments.smollm2:
        make_smollm2(arguments.smollm2)
