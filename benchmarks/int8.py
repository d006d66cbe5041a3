"""What sampling in int8 does to a model: the log-prob of human responses with weights or cache in int8.

    python benchmarks/int8.py --model=DIR --data=FILE [--rows=64] [--json=FILE]

Each token of a response is scored in float32 by the model as it is and as `config.generate.weight_dtype` and
`config.generate.cache_dtype` make it: with weights rounded, with keys and values rounded as they enter the cache, with
both. KL is that of the rounded model's next token from the model's own, over the whole vocabulary.
"""

import argparse
import functools
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from contest import machine  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from spin_jax import models  # noqa: E402
from spin_jax.data.chat import chat_format  # noqa: E402
from spin_jax.data.sources import load_examples  # noqa: E402

# name -> (weights in int8?, cache in int8?)
KINDS = {"int8 weights": (True, False), "int8 cache": (False, True), "both": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="Hugging Face directory")
    parser.add_argument("--data", required=True, help="what config.data.train may be")
    parser.add_argument("--rows", type=int, default=64, help="the file's first")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    model, params = models.load(arguments.model)
    rounded = jax.jit(functools.partial(models.quantise, dtype=jnp.float32))(params)
    chat = chat_format(AutoTokenizer.from_pretrained(arguments.model))
    score = jax.jit(functools.partial(next_token_logprobs, model), static_argnums=2)
    found = {name: [] for name in KINDS}
    for example in load_examples(arguments.data).examples[: arguments.rows]:
        prompt, real = chat.training_prompt(example.prompt), chat.real_response(example.prompt, example.response)
        row = np.concatenate([prompt, real])[: arguments.max_length]
        tokens_1T = np.zeros((1, -(-len(row) // 64) * 64), np.int32)
        tokens_1T[0, : len(row)] = row
        predicting = slice(len(prompt) - 1, len(row) - 1)
        exact_TV = np.asarray(score(params, tokens_1T, jnp.float32))[predicting]
        for name, (weights, cache) in KINDS.items():
            dtype = jnp.int8 if cache else jnp.float32
            changed_TV = np.asarray(score(rounded if weights else params, tokens_1T, dtype))[predicting]
            found[name].append(compare(exact_TV, changed_TV, row[len(prompt) :]))
    report = {"machine": machine(), "rows": arguments.rows}
    for name, rows in found.items():
        report[name] = dict(zip(("nats", "change", "KL"), np.concatenate(rows).mean(axis=0).tolist(), strict=True))
    print(*(f"{name}: {value}" for name, value in report.items()), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def next_token_logprobs(model: models.ModelConfig, params: dict, tokens_1T: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """log p of every token's successor, f32 [T, V], with keys and values read from a cache of such a dtype."""
    cache = models.init_cache(model, 1, tokens_1T.shape[1], dtype)
    hidden_1TD, _ = models.forward(model, params, tokens_1T, None, cache)
    return jax.nn.log_softmax(models.unembed(model, params, hidden_1TD[0]))


def compare(exact_TV: np.ndarray, changed_TV: np.ndarray, tokens_T: np.ndarray) -> np.ndarray:
    """For each token: the model's nats, how many more they are rounded, and the KL in nats; [T, 3]."""
    exact_T, changed_T = (np.take_along_axis(x, tokens_T[:, None], axis=1)[:, 0] for x in (exact_TV, changed_TV))
    kl_T = np.sum(np.exp(exact_TV) * (exact_TV - changed_TV), axis=1)
    return np.stack([-exact_T, exact_T - changed_T, kl_T], axis=1)


if __name__ == "__main__":
    main()
