"""What a config's field may be: names, kinds of values, words and bounds, each refused in one line."""

import difflib
from collections.abc import Iterable, Mapping

from spin_jax.errors import UserError, as_flag

# field -> the words that it can be
CHOICES = {
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ("auto", "plain", "tiled", "flash", "cudnn", "tokamax"),
    "model.remat": ("auto", "none", "full", "qkv", "attention", "gate", "mlp", "projections"),
    "model.export_dtype": ("float32", "bfloat16"),
    "data.layout": ("auto", "messages", "conversations", "prompt_response", "alpaca", "pairs"),
    "data.turn": ("last", "first"),
    "data.template": ("chat", "paper"),
    "data.long_prompts": ("keep_end", "skip"),
    "spin.loss": ("logistic", "hinge", "exponential", "correlation"),
    "spin.opponent": ("stored", "live"),
    "sft.optimizer": ("adamw", "rmsprop"),
    "train.optimizer": ("rmsprop", "adamw"),
}

MAX_INT = 2**31 - 1  # of an int32, in which jax counts; a seed becomes a random key through one
LENGTH = 2**20  # tokens, rows or slots: more than any device holds

# field -> (lowest, whether the lowest itself is allowed, highest)
BOUNDS = {
    "seed": (0, True, MAX_INT),
    "iterations": (1, True, 1000),
    "model.logits_chunk": (0, True, MAX_INT),
    "data.max_rows": (0, True, MAX_INT),
    "data.eval_rows": (0, True, MAX_INT),
    "data.max_length": (2, True, LENGTH),
    "data.max_prompt_length": (1, True, LENGTH),
    "sft.epochs": (0, True, 10_000),
    "sft.learning_rate": (0, False, 1),
    "sft.control_learning_rate": (0, False, 1),
    "generate.temperature": (0, True, MAX_INT),
    "generate.top_p": (0, False, 1),
    "generate.top_k": (0, True, MAX_INT),
    "generate.max_new_tokens": (1, True, LENGTH),
    "generate.min_new_tokens": (0, True, LENGTH),
    "generate.responses": (1, True, 128),  # sampling.MAX_RESPONSES
    "generate.batch_size": (0, True, LENGTH),
    "generate.prefill_batch_size": (0, True, LENGTH),
    "generate.tail_batch_size": (1, True, LENGTH),
    "generate.prompt_bucket": (1, True, LENGTH),
    "spin.beta": (0, False, MAX_INT),
    "spin.previous_iterations": (0, True, MAX_INT),
    "train.epochs": (0, False, 10_000),
    "train.batch_size": (1, True, LENGTH),
    "train.micro_batches": (0, True, LENGTH),
    "train.learning_rate": (0, False, 1),
    "train.warmup_ratio": (0, True, 1),
    "train.weight_decay": (0, True, MAX_INT),
    "train.clip_norm": (0, False, 1e30),
    "train.row_length": (0, True, LENGTH),
    "train.length_multiple": (1, True, LENGTH),
    "train.row_shapes": (1, True, LENGTH),
    "train.checkpoint_every": (1, True, MAX_INT),
    "lora.rank": (0, True, 2**14),
    "lora.alpha": (0, False, MAX_INT),
    "toy.train_rows": (1, True, MAX_INT),
    "toy.eval_prompts": (1, True, MAX_INT),
    "toy.hidden_size": (1, True, 2**14),
    "toy.num_layers": (1, True, 2**10),
}
SMALLEST = 1e-30  # above 0: float32, in which all is computed, makes 0 or infinity of much smaller ones

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def check_names(fields: Iterable[str], schema: Mapping[str, object]) -> None:
    """Refuse what is no field.

    Raises:
        UserError: one line with a field that may have been meant.
    """
    for field in fields:
        if field not in schema:
            if inner := [known for known in schema if known.startswith(f"{field}.")]:
                advice = f": it holds fields, such as --config.{inner[0]}"
            else:
                advice = did_you_mean(field, schema, "--config.")
            raise UserError(f"--config.{field} is not a field{advice}")


def check_field(field: str, value: object, default: object) -> None:
    """Refuse a value that is not of its default's kind, or not within its bounds, whatever the rest of the config is.

    Raises:
        UserError: one line with the field, the value, and one that it could have.
    """
    given = as_flag(field, value)
    if not _is_like(value, default):
        what = _kind(default) + (", not text" if isinstance(value, str) else "")
        raise UserError(f"{given} must be {what}: write it as {as_flag(field, _example(value, default))}")
    if field in CHOICES and value not in CHOICES[field]:
        raise UserError(f"{given} is not one of {', '.join(CHOICES[field])}{did_you_mean(value, CHOICES[field])}")
    if field in BOUNDS:
        values = value if isinstance(value, tuple) else (value,)
        if not values:
            raise UserError(f"{given} is empty: write one value an iteration, as {as_flag(field, default)}")
        for one in values:
            _check_bounds(given, one, *BOUNDS[field])


def _is_like(value: object, default: object) -> bool:
    if isinstance(default, tuple) and isinstance(value, tuple):
        return all(_is_like(one, default[0] if default else "") for one in value)
    if isinstance(value, bool):
        return isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _kind(default: object) -> str:
    if isinstance(default, tuple):
        return "a tuple of numbers" if default else "a tuple of texts"
    return _KINDS[type(default)]


def _example(value: object, default: object) -> object:
    """A value of the right kind; as near to the one that was given as can be told."""
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    return ((value if isinstance(value, str) else "###"),) if default == () else default


def _check_bounds(given: str, value: float, lowest: float, inclusive: bool, highest: float) -> None:
    if not value >= lowest or (value == lowest and not inclusive):
        raise UserError(f"{given} must be {'at least' if inclusive else 'above'} {lowest}")
    if value > highest:
        raise UserError(f"{given} must be at most {highest}")
    if 0 < value < SMALLEST:
        raise UserError(f"{given} is so small that float32 cannot hold it: write at least {SMALLEST}")


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """': did you mean X?' for the closest known name, or ''. One with the same last part is close: --config.beta for
    --config.spin.beta."""
    names = list(names)
    same = [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches(name, same, n=3, cutoff=0)
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean {' or '.join(prefix + known for known in close)}?" if close else ""
