"""Save and load adapters of Hugging Face's PEFT: low-rank updates of the linear layers of a base model.

An adapter's directory has adapter_config.json, which names its base, and adapter_model.safetensors, with A [R, inputs]
and B [outputs, R] of each updated layer (https://huggingface.co/docs/peft/developer_guides/checkpoint). To start from
an adapter, merge it into its base first: all other code sees models only.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax.checkpoints import directory as directories
from spin_jax.checkpoints import huggingface, safetensors
from spin_jax.checkpoints.directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS, has_weights, hub_name, read_config
from spin_jax.checkpoints.fingerprints import fingerprint
from spin_jax.config import LoraConfig
from spin_jax.errors import UserError
from spin_jax.models import ModelConfig, adapter_weights
from spin_jax.models.weights import Weight, weights
from spin_jax.runtime import multihost
from spin_jax.runtime.files import read_json, user_cache, writing

_PREFIX = "base_model.model."
_ONLY = {
    "peft_type": ("LORA",),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # other values change the base, too
}
_READ = ("base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", *_ONLY)
# Fields that do not change what a trained adapter computes. Its tensors show which layers it updates.
_IGNORED = ("task_type", "inference_mode", "auto_mapping", "peft_version", "target_modules", "exclude_modules")
_IGNORED += ("layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core", "qalora_group_size")
_OFF = (None, False, "none", {}, [])

_LOG = logging.getLogger(__name__)


def save_adapter(
    directory: str | os.PathLike, config: ModelConfig, lora: LoraConfig, adapters: dict, *, base: os.PathLike
) -> None:
    """Write low-rank updates (the tree of `models.init_adapters`) as an adapter that PEFT reads, in float32.

    As with `huggingface.save`, all processes must call this, and adapter_config.json is written last.

    Args:
        base: directory of the model that is updated. adapter_config.json names it; for a Hub snapshot, it names the
            repository and its commit.
    """
    directory, alpha = pathlib.Path(directory), lora.alpha
    if multihost.is_first():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ADAPTER_CONFIG).unlink(missing_ok=True)
    tensors = huggingface.tensors_of(config, adapter_weights(config, lora))
    named = {_PREFIX + tensor.name: tensor for tensor in tensors}
    huggingface.write_tensors(directory / ADAPTER_WEIGHTS, named, adapters, np.dtype(np.float32))
    if multihost.is_first():
        name, revision = hub_name(base)
        content = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"}
        content |= {"base_model_name_or_path": name, "revision": revision, "r": lora.rank}
        content |= {"lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": lora.use_rslora}
        content |= {"lora_dropout": lora.dropout, "target_modules": list(lora.target_modules)}
        huggingface.write_json(directory / ADAPTER_CONFIG, content)


def describe(path_or_id: str | os.PathLike, revision: str | None = None) -> ModelConfig:
    """Describe a model, or an adapter's base, from its config.json. Download nothing else. Raise as `resolve` and
    `read_config` do."""
    directory = directories.resolve(path_or_id, revision, fetched=["config.json", ADAPTER_CONFIG])
    return _of_base(directory, describe) if _is_adapter(directory) else read_config(directory)


def resolve(path_or_id: str | os.PathLike, revision: str | None = None) -> pathlib.Path:
    """Return the local directory of a model, as `directory.resolve` finds it.

    For an adapter, return its base with the adapter merged in float32, and with the adapter's tokenizer if it has one.
    It is made once, and kept in the user's cache.

    Raises:
        UserError: as `directory.resolve`; or the adapter is not supported, or does not fit its base.
    """
    directory = directories.resolve(path_or_id, revision)
    if not _is_adapter(directory):
        if (directory / ADAPTER_CONFIG).is_file():
            _LOG.warning("%s holds a model and an adapter: the model is read, and the adapter is not", directory)
        return directory
    return multihost.run_alone(lambda: _merged(directory, _of_base(directory, resolve)))


def _is_adapter(directory: pathlib.Path) -> bool:
    return (directory / ADAPTER_CONFIG).is_file() and not has_weights(directory)


def _of_base(directory: pathlib.Path, find: Callable) -> Any:
    """Check that an adapter is supported, and return `find` of the base that it names."""
    file, content = directory / ADAPTER_CONFIG, _read_settings(directory)
    name, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise UserError(
            f"{file}: write the directory or Hub id of its base as base_model_name_or_path, with its revision"
        )
    try:
        return find(name, None if os.path.isdir(name) else revision)
    except RecursionError:
        raise UserError(f"{file}: its base_model_name_or_path={name} leads back to itself; name its base") from None
    except UserError as error:
        raise UserError(f"{file}: its base_model_name_or_path: {error}") from None


def _merged(directory: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Merge an adapter into its base, unless the cache has the result, and return its directory."""
    content, model = _read_settings(directory), read_config(base)
    stored = directories.stored_tensors(base)
    huggingface.check_tensors(base, model, stored)
    updates, rank = _updates(directory, base, model, content), content["r"]
    scale = content["lora_alpha"] / (math.sqrt(rank) if content.get("use_rslora") else rank)

    def read(weight: Weight, layer: int | None = None) -> np.ndarray:
        name = weight.name if layer is None else huggingface.stored_name(weight, layer)
        theirs = stored[name].map()
        if name in updates:
            a, b = (tensor.map().astype(np.float32) for tensor in updates[name])
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise UserError(f"{directory / ADAPTER_WEIGHTS}: the update of {name} is not finite; train it anew")
            theirs = theirs.astype(np.float32) + np.float32(scale) * (b @ a)
        return huggingface.from_stored(weight, theirs)

    def param(path: tuple, weight: Weight) -> np.ndarray | _Layers:
        return _Layers(weight, read) if path[0].key == "layers" else read(weight)

    own_tokenizer = (directory / "tokenizer_config.json").is_file()
    files = [directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS]
    files += directories.tokenizer_files(directory) if own_tokenizer else []
    hashes = [fingerprint(base), *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]
    merged = user_cache("merged") / hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]
    if (merged / "config.json").is_file() and has_weights(merged):
        return merged
    shutil.rmtree(merged, ignore_errors=True)  # a program that cleans caches may have left parts of it
    _LOG.info("%s: an adapter of %s; the two merged are kept in %s", directory, base, merged)
    with writing(merged.parent):
        merged.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=merged.parent) as partial:
            whole = pathlib.Path(partial) / "model"
            params = jax.tree.map_with_path(param, weights(model))
            huggingface.save(whole, model, params, source=base, dtype=jnp.dtype(jnp.float32))
            if own_tokenizer:
                huggingface.copy_tokenizer(directory, whole)
            try:
                whole.rename(merged)
            except OSError:
                if not (merged / "config.json").is_file():  # if it is there, another process was faster
                    raise
    return merged


@dataclasses.dataclass(frozen=True)
class _Layers:
    """A param whose layers are read when they are indexed."""

    weight: Weight
    read: Callable[[Weight, int], np.ndarray]

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.read(self.weight, layer)


def _read_settings(directory: pathlib.Path) -> dict[str, Any]:
    """Read adapter_config.json. Refuse adapters whose weights are not w + scale B A alone."""
    file = directory / ADAPTER_CONFIG
    content = read_json(file)
    remedy = "merge it into its base with merge_and_unload() of peft, and name the merged model"
    others = dict.fromkeys((name for name in content if name not in _READ + _IGNORED), _OFF)
    for name, supported in (_ONLY | others).items():
        if (value := content.get(name)) not in supported:
            raise UserError(f"{file}: {name}={json.dumps(value)} is not supported; {remedy}")
    for name in ("r", "lora_alpha"):
        if not isinstance(content.get(name), (int, float)) or not 0 < content[name] < math.inf:
            raise UserError(f"{file}: {name}={json.dumps(content.get(name))} must be a number above 0; mend it")
    if not isinstance(content.get("use_rslora"), bool | None):
        raise UserError(f"{file}: use_rslora={json.dumps(content['use_rslora'])} must be true or false; mend it")
    return content


def _updates(
    directory: pathlib.Path, base: pathlib.Path, model: ModelConfig, content: dict[str, Any]
) -> dict[str, tuple[safetensors.StoredTensor, safetensors.StoredTensor]]:
    """Return (A, B) of each updated tensor, by its name in the base."""
    file, rank = directory / ADAPTER_WEIGHTS, content["r"]
    if not file.is_file():
        raise UserError(f"{directory}: has no {ADAPTER_WEIGHTS}; save the adapter with peft anew, which writes it")
    found, updates = safetensors.read_header(file), {}
    for tensor in huggingface.tensors_of(model):
        if tensor.layer is None or not tensor.weight.inputs:
            continue
        outputs, inputs = huggingface.stored_shape(tensor.weight)
        stem = _PREFIX + tensor.name.removesuffix("weight")
        shapes = {f"{stem}lora_A.weight": (rank, inputs), f"{stem}lora_B.weight": (outputs, rank)}
        if not shapes.keys() & found.keys():
            continue
        for name, shape in shapes.items():
            if name not in found or found[name].shape != shape:
                has = f"has the shape {found[name].shape}" if name in found else "is missing"
                raise UserError(f"{file}: {name} {has}, where r={rank} and {base} ask for {shape}: not its base?")
        a, b = (found.pop(name) for name in shapes)
        updates[tensor.name] = (a, b)
    if found or not updates:
        what = f"{next(iter(found))} is no update" if found else "there is no update"
        raise UserError(f"{file}: {what} of a linear layer in {base}: not its base, or not supported")
    return updates
