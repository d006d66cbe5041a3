"""Read a model directory's tokenizer and stop ids, or refuse them in one line that names the file."""

import importlib
import json
import pathlib
import re
from typing import TYPE_CHECKING, cast

from spin_jax.errors import UserError
from spin_jax.runtime.files import read_bytes, read_json, read_json_if_there

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

# Files that transformers reads as text.
_READ = ("tokenize*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "*templates/*.jinja")


def load_tokenizer(directory: pathlib.Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in a model's directory.

    Raises:
        UserError: there is none, it is damaged, or it needs a package that is not installed.
    """
    from transformers import AutoTokenizer

    model = directory / "tokenizer.model"
    # transformers would accept an empty tokenizer.model, and a link whose file is gone: read them here to refuse them.
    if model.exists():
        read_bytes(model)
    read_json_if_there(directory / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a plain Exception, transformers any kind
        raise UserError(_why_not(directory, error)) from None
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: {type(tokenizer).__name__} is not a fast tokenizer: save it as tokenizer.json")
    return tokenizer


def backend(tokenizer: "PreTrainedTokenizerBase") -> "tokenizers.Tokenizer":
    """The `tokenizers.Tokenizer` inside a fast tokenizer."""
    return cast("tokenizers.Tokenizer", tokenizer.backend_tokenizer)


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids of special tokens, which decode to no text: those with a role, and those that tokenizer.json marks."""
    marked = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *marked))


def own_stop_ids(directory: pathlib.Path) -> tuple[int, ...]:
    """Return the ids at which transformers would stop: those in generation_config.json, else in config.json.

    Raises:
        UserError: a file is damaged, or its eos_token_id holds no ids.
    """
    for name in ("generation_config.json", "config.json"):
        found = read_json_if_there(directory / name).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise UserError(
                    f"{directory / name}: eos_token_id={json.dumps(found)} must be a token's id or a list of ids: "
                    "write numbers, such as 2 or [2, 7]"
                )
            return tuple(ids)
    return ()


def _why_not(directory: pathlib.Path, error: Exception) -> str:
    """Find out why a tokenizer could not be loaded, and what to do about it."""
    from huggingface_hub.errors import StrictDataclassError

    for file in (file for pattern in _READ for file in directory.glob(pattern)):
        try:
            read_json(file) if file.suffix == ".json" else file.read_text(encoding="utf-8")
        except UserError as damage:
            return str(damage)
        except (OSError, UnicodeDecodeError):
            return f"{file}: cannot be read as text: save it as UTF-8, or download it again"
    config, model = directory / "tokenizer_config.json", directory / "tokenizer.model"
    if "auto_map" in read_json_if_there(config):
        return (
            f"{config}: auto_map names code of the model's own, which is not run: take auto_map out, so that its "
            "tokenizer.json is read, or save it as a fast tokenizer where you trust the code"
        )
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, StrictDataclassError):
        return f"{directory / 'config.json'}: transformers does not take it ({what}): mend that value"
    if (directory / "tokenizer.json").exists():
        return f"{directory / 'tokenizer.json'} or a file beside it is damaged ({what}): download the tokenizer again"
    if not model.exists():
        return f"{directory}: no tokenizer can be loaded, as it has no tokenizer.json: copy the model's tokenizer files"
    if re.match(rb"[A-Za-z0-9+/=]+ [0-9]+\s", model.read_bytes()[:999]):
        return f"{model}: is a tiktoken file: download the model in Hugging Face's layout, which has a tokenizer.json"
    try:
        for module in ("sentencepiece", "google.protobuf"):
            importlib.import_module(module)
    except ImportError:
        return (
            f"{model}: without a tokenizer.json it is read with sentencepiece, which is not installed: "
            "pip install 'spin_jax[sentencepiece]'"
        )
    return f"{model}: no SentencePiece model can be read from it ({what}): download it again"
