"""Identify a model by the content of its files, part by part: not by paths or times, so that a copy is the same."""

import hashlib
import itertools
import json
import math

from etils import epath

from spin_jax.checkpoints import safetensors
from spin_jax.checkpoints.directory import read_config, read_config_json, stored_tensors, tokenizer_files
from spin_jax.runtime.files import read_json_if_there

# Read up to so many bytes of weights whole. Of more, read blocks of every tensor: its first, its last, and others at
# even distances. That suffices, since fine-tuning changes most numbers of each tensor that it changes.
_WHOLE = 2**30
_BLOCK = 2**18
_TEMPLATES = ("chat_template", "additional_chat_templates")


def fingerprint(directory: epath.PathLike, *, weights: bool = True) -> dict[str, str]:
    """Hash a model's "architecture", "tokenizer", "chat template", "stop ids" and, with `weights`, its "weights".

    The hashes depend on what is loaded, not on paths, times, or how weights are split over files.

    Args:
        directory: a Hugging Face directory, local or gs://.
        weights: hash them too, which takes about a second for a gigabyte, and no longer for more.

    Raises:
        UserError: there is no model, or a file of it is damaged.
    """
    directory = epath.Path(directory)
    config = read_config_json(directory)
    generation = read_json_if_there(directory / "generation_config.json")
    tokenizer = read_json_if_there(directory / "tokenizer_config.json")
    template = tokenizer.pop("chat_template", None)
    hashes = {str(file.relative_to(directory)): _file_hash(file) for file in tokenizer_files(directory)}
    hashes.pop("tokenizer_config.json", None)
    templates = {name: hashes.pop(name) for name in sorted(hashes) if name.startswith(_TEMPLATES)}
    parts = {
        "architecture": read_config(directory).to_huggingface(""),
        "tokenizer": [tokenizer, hashes],
        "chat template": [template, templates],
        "stop ids": [generation.get("eos_token_id"), config.get("eos_token_id")],
    }
    if weights:
        parts["weights"] = _tensor_hashes(stored_tensors(directory))
    texts = {name: json.dumps(content, sort_keys=True) for name, content in parts.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def _file_hash(file: epath.Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:  # a file that is needed is refused where it is read
        return None


def _tensor_hashes(stored: dict[str, safetensors.StoredTensor]) -> dict[str, str]:
    stride = _BLOCK * max(1, math.ceil(sum(tensor.nbytes for tensor in stored.values()) / _WHOLE))
    hashes = {}
    in_order = sorted(stored.items(), key=lambda item: (str(item[1].file), item[1].offset))
    for file, tensors in itertools.groupby(in_order, key=lambda item: item[1].file):
        with epath.Path(file).open("rb") as stream:
            for name, tensor in tensors:
                digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
                for start in sorted({*range(0, tensor.nbytes, stride), max(0, tensor.nbytes - _BLOCK)}):
                    stream.seek(tensor.offset + start)
                    digest.update(stream.read(min(_BLOCK, tensor.nbytes - start)))
                hashes[name] = digest.hexdigest()
    return hashes
