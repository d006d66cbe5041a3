"""A tiny Llama on disk with a character tokenizer, and data for it: whole runs in seconds, with no download."""

import json
import pathlib

import jax
import numpy as np

from spin_jax import checkpoints, models
from spin_jax.config import Config, base_config, freeze

TRAIN_ROWS, EVAL_ROWS = 16, 8
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
HUGGINGFACE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 104,  # five more than the tokenizer has, as padded vocabularies do
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# Three layers, of which the second sees beyond a window that is shorter than prompts and responses.
GEMMA = {key: value for key, value in HUGGINGFACE.items() if key not in ("architectures", "hidden_act", "rope_theta")}
GEMMA |= {"model_type": "gemma3_text", "tie_word_embeddings": True, "num_hidden_layers": 3, "query_pre_attn_scalar": 8}
GEMMA |= {"sliding_window": 4, "sliding_window_pattern": 2}
SETTINGS = {
    "model.compute_dtype": "float32",  # sums on one device and on many are compared
    "iterations": 2,
    "data.eval_rows": EVAL_ROWS,
    "evaluate.evaluators": ("rewards",),  # and no samples, which the session's finished run has
    "data.max_length": 64,
    "data.max_prompt_length": 48,  # holds the paper's templates
    "generate.max_new_tokens": 8,
    "generate.batch_size": 8,
    "generate.prompt_bucket": 48,
    "train.epochs": 1.0,
    "train.batch_size": 8,
    "train.learning_rate": (1e-3,),
    "train.row_length": 128,
    "train.length_multiple": 32,
    "train.checkpoint_every": 1,
}


def write_model(directory: pathlib.Path, huggingface: dict = HUGGINGFACE, seed: int = 0) -> pathlib.Path:
    """A Hugging Face directory with random weights, wide enough that responses differ from prompt to prompt."""
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(directory)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = models.ModelConfig.from_huggingface(huggingface | ids, "tiny")
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, models.init_params(config, jax.random.key(seed)))
    checkpoints.save(directory, config, params, token_ids=ids, dtype=np.float32)
    return directory


def character_tokenizer():
    """Every printable ASCII character a token, and three special ones."""
    import tokenizers
    import transformers

    characters = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]  # the last two are how ByteLevel writes " " and "\n"
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(characters)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_rows() -> list[dict]:
    """Prompts of 3 to 7 letters; the answer is the prompt backwards."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 8, size=TRAIN_ROWS + EVAL_ROWS)
    words = ["".join(rng.choice(list("abcdefgh"), size=length)) for length in lengths]
    return [{"prompt": word, "response": word[::-1]} for word in words]


def write_jsonl(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """`rows`, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(model: pathlib.Path, data: pathlib.Path, changes: dict[str, object] | None = None) -> Config:
    """The config of a tiny run, with `changes` by their dotted names."""
    config = base_config()
    paths = {"model.path": str(model), "data.train": str(data)}
    config.update_from_flattened_dict(SETTINGS | paths | (changes or {}))
    return freeze(config)
