"""Find a model's directory, and the files in it that are read. Other files are ignored."""

import contextlib
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from spin_jax.checkpoints import safetensors
from spin_jax.errors import UserError
from spin_jax.models.config import ModelConfig
from spin_jax.runtime.files import find, is_remote, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokeniz*",  # tokenizer.json, tokenizer_config.json, tokenizer.model, tokenization_*.py
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*",
    "*merges*",
    "*.model",  # SentencePiece, under any of its names
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT
FETCHED = ["config.json", "generation_config.json", "model*.safetensors", INDEX, *TOKENIZER_FILES]
FETCHED += [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
VARIANTS = ["*.fp16*", "*.bf16*", "*.fp32*"]  # the same weights in another dtype, which are not downloaded

# What a directory without a model may hold instead, and what to do about it.
_INSTEAD = (
    (
        ADAPTER_CONFIG,
        "holds a LoRA adapter, not a model; merge it into its base model (merge_and_unload() of peft) and save that",
    ),
    (
        "*model*.bin",
        "has only pickled weights (.bin), which can run code when they are read; load them with transformers where you "
        "trust them, and write model.save_pretrained(directory, safe_serialization=True)",
    ),
    ("*.gguf", "holds GGUF weights; name the safetensors model that they were made from"),
    (
        "consolidated*",
        "holds weights under their maker's own names (consolidated.*); download the model in Hugging Face's layout",
    ),
    ("model*.*.safetensors", f"has only a variant of the weights; rename the one that you want to {WEIGHTS}"),
    ("model*.safetensors", f"has weights without {INDEX}; download that file too"),
)

_LOG = logging.getLogger(__name__)


def resolve(
    path_or_id: str | os.PathLike, revision: str | None = None, fetched: Sequence[str] = FETCHED
) -> pathlib.Path:
    """Return the local directory of a model: the one named, or a snapshot of a Hub repository, downloaded once.

    A directory takes precedence over a repository of the same name.

    Args:
        fetched: patterns of the repository's files to download.

    Raises:
        UserError: there is no such directory, and the Hub does not have it or cannot be reached.
    """
    name = os.fspath(path_or_id) or "''"
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if revision is not None:
            raise UserError(f"{name}: a directory has no revision; leave {revision!r} out, or name a Hub repository")
        return pathlib.Path(path)
    if os.path.isfile(path.rstrip("/")):
        raise UserError(f"{name}: a file; name the directory that holds it: {os.path.dirname(path.rstrip('/')) or '.'}")
    if os.path.islink(path.rstrip("/")):
        raise UserError(f"{name}: a link that leads to no directory; mend it, or name the directory itself")
    repository = name.removeprefix("https://huggingface.co/").removeprefix("hf://").rstrip("/")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repository):
        hint = "copy the model to this machine" if "://" in name else "a Hub repository is written owner/name"
        raise UserError(f"{name}: no such directory ({hint})")
    return _download(repository, revision, fetched)


def _download(repository: str, revision: str | None, fetched: Sequence[str]) -> pathlib.Path:
    import huggingface_hub

    if fetched == FETCHED:
        _LOG.info("%s: from the Hugging Face Hub, or what this machine has of it", repository)
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(fetched), ignore_patterns=VARIANTS
            )
        )
    except (OSError, ValueError) as error:  # every error of the Hub's client is one of the two
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"{repository}{at}: no directory here, and the Hugging Face Hub did not give it ({type(error).__name__}); "
            "check the name, run `hf auth login` if it is gated, or download it elsewhere and name the directory"
        ) from error


def read_config(directory: epath.PathLike) -> ModelConfig:
    """Return the architecture of the model in a directory, from its config.json. Raise UserError as `load` does."""
    file = epath.Path(directory) / "config.json"
    return ModelConfig.from_huggingface(read_config_json(directory), str(file))


def read_config_json(directory: epath.PathLike) -> dict[str, Any]:
    """Return the parsed config.json of a model's directory.

    Raises:
        UserError: there is none; the message guesses why.
    """
    directory = epath.Path(directory)
    file = directory / "config.json"
    content = read_json(file) if file.exists() else {}
    if "model_type" in content:
        return content
    inner = [str(file.parent) for depth in ("*", "*/*") for file in find(directory, f"{depth}/config.json")]
    if inner and not has_weights(directory):
        newest = max(inner, key=lambda name: (len(name), name))  # checkpoint-1000, not checkpoint-500
        raise UserError(f"{directory}: not a model but a directory of models; name one of them, such as {newest}")
    if file.exists():
        raise UserError(f"{file}: has no model_type; it is not the config.json of a Hugging Face model")
    raise UserError(_why_none(directory) or f"{file}: not found; a model directory has config.json and {WEIGHTS}")


def stored_tensors(directory: epath.PathLike) -> dict[str, safetensors.StoredTensor]:
    """Return every tensor of a model's directory, by name, from the headers of its files.

    Raises:
        UserError: a file is missing or damaged, or a tensor is there twice.
    """
    directory = epath.Path(directory)
    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file():
        if index.exists():
            _LOG.warning("%s: has both %s, which is read as transformers does, and %s", directory, WEIGHTS, INDEX)
        return safetensors.read_header(single)
    if not index.is_file():
        raise UserError(_why_none(directory) or f"{directory}: has neither {WEIGHTS} nor {INDEX}; download it again")
    stored: dict[str, safetensors.StoredTensor] = {}
    for file in _shards(index):
        if not file.is_file():
            raise UserError(f"{file}: not found, but {INDEX} names it; download it again")
        tensors = safetensors.read_header(file)
        if twice := sorted(stored.keys() & tensors.keys()):
            raise UserError(f"{file}: holds {twice[0]}, as {stored[twice[0]].file.name} does; keep one of the two")
        stored |= tensors
    return stored


def _shards(index: epath.Path) -> list[epath.Path]:
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise UserError(f"{index}: its weight_map does not give each tensor a file's name; download it again")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def hub_name(directory: epath.PathLike) -> tuple[str, str | None]:
    """Return (repository, commit) of a Hub snapshot, and (absolute path, None) of any other directory."""
    match = re.search(r"/models--([^/]+)/snapshots/(\w+)/?$", os.fspath(directory))
    if match:
        return match[1].replace("--", "/"), match[2]
    return (os.fspath(directory) if is_remote(directory) else os.path.abspath(directory)), None


def has_weights(directory: epath.Path | pathlib.Path) -> bool:
    """Whether a directory has a model's weights, or their index."""
    return (directory / WEIGHTS).exists() or (directory / INDEX).exists()


def _why_none(directory: epath.Path) -> str | None:
    """Say what a directory without a model holds instead; None if nothing is known of it."""
    for name in ("config.json", WEIGHTS, INDEX):
        if os.path.islink(directory / name) and not (directory / name).exists():
            return f"{directory / name}: a link whose file is gone; download the model again"
    if has_weights(directory):
        return None
    return next((f"{directory}: {what}" for pattern, what in _INSTEAD if find(directory, pattern)), None)


def tokenizer_files(directory: epath.PathLike) -> list[epath.Path]:
    """Return the files of a tokenizer and its chat templates, also those in a folder of their own."""
    directory = epath.Path(directory)
    found = {file for pattern in TOKENIZER_FILES for file in find(directory, pattern)}
    return sorted(file for file in found if file.is_file())


@contextlib.contextmanager
def downloaded(directory: epath.Path) -> Iterator[epath.Path]:
    """Yield the directory, or a local copy if it is remote: files in an object store cannot be mapped into memory."""
    if not is_remote(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as local:
        for file in directory.iterdir():
            if file.is_file():
                file.copy(epath.Path(local) / file.name)
        yield epath.Path(local)


@contextlib.contextmanager
def uploaded(directory: epath.Path) -> Iterator[epath.Path]:
    """Yield the directory; if it is remote, yield a local one, and copy its files afterwards. Copy config.json, or that
    of an adapter, last: it shows that the model is complete."""
    if not is_remote(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)
        files = [file for file in pathlib.Path(local).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file.name in ("config.json", ADAPTER_CONFIG)):
            to = directory / file.relative_to(local)
            to.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(file).copy(to, overwrite=True)
