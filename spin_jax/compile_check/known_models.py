"""Describe the models that the docs name, for planning a run where neither the Hub nor a copy is at hand.

Fields and values are those of each repository's `config.json`, as far as they matter to the computation.
"""

import os

from spin_jax import checkpoints
from spin_jax.models.config import ModelConfig


def describe(path_or_id: str | os.PathLike, revision: str | None = None) -> ModelConfig:
    """Describe a model like `checkpoints.describe`, which is not asked for one that is known here."""
    name = os.fspath(path_or_id)
    described = None if os.path.isdir(os.path.expanduser(name)) else known(name)
    return described or checkpoints.describe(path_or_id, revision)


_LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_GEMMA_3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
}
_CONFIG_JSON = {
    "alignment-handbook/zephyr-7b-sft-full": _LLAMA  # Mistral-7B-v0.1
    | {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "meta-llama/Llama-2-7b-hf": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": _LLAMA
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "google/gemma-3-270m-it": _GEMMA_3 | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "google/gemma-3-1b-it": _GEMMA_3 | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
}


def known(hub_id: str) -> ModelConfig | None:
    """The description of a Hub repository that is known here; None for any other."""
    fields = _CONFIG_JSON.get(hub_id)
    return ModelConfig.from_huggingface(fields, f"{hub_id}/config.json") if fields else None
