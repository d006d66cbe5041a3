"""Hugging Face model directories in and out: their names and layouts, and ours.

Loading copies only the slices that live on this host and saving fetches one tensor at a time, so that neither needs
host memory for more than this host's params and one of them besides.
"""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.checkpoints import safetensors
from spin_jax.checkpoints.directory import INDEX, WEIGHTS, read_config, resolve, stored_tensors, tokenizer_files
from spin_jax.errors import UserError
from spin_jax.models import abstract_params, for_compute
from spin_jax.models.config import ModelConfig
from spin_jax.runtime import multihost
from spin_jax.runtime.files import find, read_json, read_json_if_there

# Our path -> (their name with `{}` for the layer, how many of our leading axes are a matmul's inputs). torch.nn.Linear
# stores [outputs, inputs], each flattened to one axis; 0 inputs is a flattened bias; None is stored as it is here.
_LAYOUT: dict[tuple[str, ...], tuple[str, int | None]] = {
    ("embed", "embedding"): ("model.embed_tokens.weight", None),
    ("layers", "attention_norm"): ("model.layers.{}.input_layernorm.weight", None),
    ("layers", "attention", "q"): ("model.layers.{}.self_attn.q_proj.weight", 1),
    ("layers", "attention", "k"): ("model.layers.{}.self_attn.k_proj.weight", 1),
    ("layers", "attention", "v"): ("model.layers.{}.self_attn.v_proj.weight", 1),
    ("layers", "attention", "o"): ("model.layers.{}.self_attn.o_proj.weight", 2),
    ("layers", "attention", "q_bias"): ("model.layers.{}.self_attn.q_proj.bias", 0),
    ("layers", "attention", "k_bias"): ("model.layers.{}.self_attn.k_proj.bias", 0),
    ("layers", "attention", "v_bias"): ("model.layers.{}.self_attn.v_proj.bias", 0),
    ("layers", "attention", "q_norm"): ("model.layers.{}.self_attn.q_norm.weight", None),
    ("layers", "attention", "k_norm"): ("model.layers.{}.self_attn.k_norm.weight", None),
    ("layers", "mlp_norm"): ("model.layers.{}.post_attention_layernorm.weight", None),
    ("layers", "mlp", "gate"): ("model.layers.{}.mlp.gate_proj.weight", 1),
    ("layers", "mlp", "up"): ("model.layers.{}.mlp.up_proj.weight", 1),
    ("layers", "mlp", "down"): ("model.layers.{}.mlp.down_proj.weight", 1),
    ("final_norm",): ("model.norm.weight", None),
    ("lm_head",): ("lm_head.weight", 1),
}


class _Weight(NamedTuple):
    """One tensor of a checkpoint: one of our params, or one layer of it."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]  # ours, without the axis of layers
    name: str  # theirs
    inputs: int | None

    @property
    def their_shape(self) -> tuple[int, ...]:
        if self.inputs is None:
            return self.shape
        outputs = math.prod(self.shape[self.inputs :])
        return (outputs, math.prod(self.shape[: self.inputs])) if self.inputs else (outputs,)

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """Always a view, so that a mapped tensor stays unread: axes are swapped, then split."""
        return (theirs.T if self.inputs else theirs).reshape(self.shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        return ours.reshape(self.their_shape[::-1]).T if self.inputs else ours.reshape(self.their_shape)


def load(
    path_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: jnp.dtype = jnp.float32,
    shardings: dict | None = None,
) -> tuple[ModelConfig, dict]:
    """Reads a Llama, Mistral, Qwen2 or Qwen3 checkpoint; `models.init_params` describes the tree.

    Args:
        path_or_id: a directory with config.json and safetensors, or a Hub repository.
        revision: branch, tag or commit of a Hub repository.
        dtype: of the params, whatever the file's; norm scales are float32, as `models.for_compute` leaves them.
        shardings: a tree of jax.sharding.Sharding like the params'; each process reads only its own devices' slices.
            None: everything on this process's first device.

    Raises:
        UserError: not found, not supported, the tensors are not those that config.json describes, or one is not finite.
    """
    directory = resolve(path_or_id, revision)
    config = read_config(directory)
    stored = stored_tensors(directory)
    _check_tensors(directory, config, stored)

    abstract = jax.eval_shape(functools.partial(for_compute, dtype=dtype), abstract_params(config))
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    weights: dict[tuple[str, ...], list[_Weight]] = {}
    for weight in _weights(config):
        weights.setdefault(weight.path, []).append(weight)

    def place(path: tuple, param: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        read = _Reader(weights[_names(path)], stored, param)
        # Waiting lets go of this param's host copy before the next is read.
        return jax.block_until_ready(jax.make_array_from_callback(param.shape, sharding, read))

    return config, jax.tree.map_with_path(place, abstract, shardings)


class _Reader:
    """Reads slices of one param. Devices that hold the same slice share one copy of it."""

    def __init__(
        self, weights: list[_Weight], stored: dict[str, safetensors.StoredTensor], param: jax.ShapeDtypeStruct
    ):
        self._weights, self._stored, self._param = weights, stored, param
        self._slices: dict[tuple, np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, self._param.shape, strict=True))
        if bounds not in self._slices:
            self._slices[bounds] = self._read(index, tuple(stop - start for start, stop in bounds))
        return self._slices[bounds]

    def _read(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, self._param.dtype)
        if self._weights[0].layer is None:
            self._copy(self._weights[0], index, out)
        else:
            for out_of_layer, weight in zip(out, self._weights[index[0]], strict=True):
                self._copy(weight, index[1:], out_of_layer)
        return out

    def _copy(self, weight: _Weight, index: tuple[slice, ...], out: np.ndarray) -> None:
        stored = self._stored[weight.name]
        with np.errstate(over="ignore"):  # it is refused below
            out[...] = weight.to_ours(stored.map())[index]
        if not _all_finite(out):
            raise UserError(
                f"{stored.file}: {weight.name} holds values that are not finite in {out.dtype}; download it again, or "
                "name a checkpoint from before its training failed"
            )


def _all_finite(x: np.ndarray) -> bool:
    """Without a copy: of the numbers of each sign, infinity and NaN have the largest bits."""
    bits = x.view(f"u{x.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(bits.dtype)
    sign = np.array(-0.0, x.dtype).view(bits.dtype)
    return bool(bits.max() < sign | infinity and bits.view(f"i{x.itemsize}").max() < infinity.astype(np.int64))


def save(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: dict,
    *,
    source: str | os.PathLike | None = None,
    token_ids: dict[str, int | list[int]] | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a directory that `load` and transformers (4 and 5) read.

    Where params are split over several processes, all of them must call it: the first one writes, a tensor at a time,
    and is done last.

    Files are written beside their names and renamed when whole, and config.json comes last: a directory with a
    config.json is complete.

    Args:
        source: the directory that the model came from: its tokenizer is copied, and what its config.json and
            generation_config.json say beyond the architecture is kept.
        token_ids: bos_token_id, eos_token_id and pad_token_id to write instead of the source's.
        dtype: float32, float16 or bfloat16. Casting back to the dtype that the weights came in is exact.
        max_shard_bytes: weights beyond this start another file; a tensor is never split.

    Raises:
        UserError: `directory` is `source`, `source` is no model (any more), or the dtype is none of the three.
    """
    directory = pathlib.Path(os.path.expanduser(directory))
    source = None if source is None else pathlib.Path(source)
    dtype = jnp.dtype(dtype)
    if dtype not in safetensors.DTYPES.values():
        raise UserError(f"weights cannot be saved as {dtype}; write float32, float16 or bfloat16")
    if source is not None and os.path.realpath(source) == os.path.realpath(directory):
        raise UserError(f"{directory}: would overwrite the model that it is saved from; name another directory")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: a file is there; name another directory")

    configs = multihost.on_first(lambda: _configs(config, source, token_ids or {}, dtype))
    writes = multihost.is_first()
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
    shards = _plan_shards(config, dtype, max_shard_bytes)
    for file, weights in shards.items():
        tensors = (_fetch(weight, params, dtype) for weight in weights)
        if writes:
            theirs = (weight.to_theirs(np.asarray(ours)) for weight, ours in zip(weights, tensors, strict=True))
            safetensors.write(directory / file, {weight.name: weight.their_shape for weight in weights}, dtype, theirs)
        else:
            for ours in tensors:  # take part in the gathering, of one tensor at a time
                jax.block_until_ready(ours)
    if writes:
        _write_index(directory, shards, dtype)
        if source is not None:
            _copy_tokenizer(source, directory)
        for name, content in configs.items():
            _write_json(directory / name, content)


def holds(directory: str | os.PathLike, config: ModelConfig, params: dict) -> bool:
    """Whether a directory holds these very weights, a tensor at a time; f32, as `save` writes them with that dtype."""
    stored = stored_tensors(directory)

    def is_same(weight: _Weight) -> bool:
        ours = weight.to_theirs(np.asarray(_fetch(weight, params, jnp.float32)))
        return weight.name in stored and np.array_equal(stored[weight.name].map(), ours, equal_nan=True)

    return all(map(is_same, _weights(config)))


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def _weights(config: ModelConfig) -> Iterator[_Weight]:
    """Every tensor of a checkpoint, those of a layer together."""
    leaves = jax.tree.leaves_with_path(abstract_params(config))
    shapes = {_names(path): param.shape for path, param in leaves}
    layout = [(path, *_LAYOUT[path]) for path in _LAYOUT if path in shapes]
    for path, name, inputs in layout:
        if path[0] != "layers":
            yield _Weight(path, None, shapes[path], name, inputs)
    for layer in range(config.num_layers):
        for path, name, inputs in layout:
            if path[0] == "layers":
                yield _Weight(path, layer, shapes[path][1:], name.format(layer), inputs)


def _check_tensors(directory: pathlib.Path, config: ModelConfig, stored: dict[str, safetensors.StoredTensor]) -> None:
    """The checkpoint holds the tensors that config.json describes, and nothing else that would be lost."""
    expected = {weight.name: weight.their_shape for weight in _weights(config)}
    if missing := [name for name in expected if name not in stored]:
        hint = "is config.json that of these weights?"
        if missing == ["lm_head.weight"]:
            hint = "if it is the embedding, set tie_word_embeddings to true in config.json"
        raise UserError(f"{directory}: {_count(missing)} missing; {hint}")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(f"{directory}: {name} has the shape {stored[name].shape}; config.json says {shape}")
    # Old versions of transformers wrote the constant rotary frequencies.
    unexpected = [name for name in stored if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_embeddings and "lm_head.weight" in unexpected:
        tied = (stored[name].map() for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if not np.array_equal(*tied, equal_nan=True):
            raise UserError(
                f"{directory}: lm_head.weight is not model.embed_tokens.weight, but config.json says that they are "
                "tied; set tie_word_embeddings to false"
            )
        unexpected.remove("lm_head.weight")
    if unexpected:
        raise UserError(
            f"{directory}: {_count(unexpected)} not part of a {config.model_type} model as config.json says"
        )


def _count(names: list[str]) -> str:
    return f"tensor {names[0]} is" if len(names) == 1 else f"tensor {names[0]} and {len(names) - 1} others are"


def _plan_shards(config: ModelConfig, dtype: np.dtype, max_shard_bytes: int) -> dict[str, list[_Weight]]:
    """File name -> the weights in it, in order."""
    shards: list[list[_Weight]] = [[]]
    filled = 0
    for weight in _weights(config):
        size = math.prod(weight.shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _fetch(weight: _Weight, params: dict, dtype: np.dtype) -> np.ndarray | jax.Array:
    """One tensor in our layout, on the devices of all hosts, from wherever its shards are."""
    param = functools.reduce(dict.__getitem__, weight.path, params)
    ours = (param if weight.layer is None else param[weight.layer]).astype(dtype)
    if isinstance(ours, jax.Array) and not ours.is_fully_addressable:
        ours = jax.device_put(ours, NamedSharding(ours.sharding.mesh, PartitionSpec()))
    return ours


def _write_index(directory: pathlib.Path, shards: dict[str, list[_Weight]], dtype: np.dtype) -> None:
    """The index of several shards. Files of an older model that were not replaced go, lest they be read instead."""
    for old in (*find(directory, "model*.safetensors"), *find(directory, INDEX)):
        if old.name not in shards and not old.is_dir():
            old.unlink()
    if len(shards) > 1:
        total = sum(math.prod(weight.shape) for shard in shards.values() for weight in shard) * dtype.itemsize
        weight_map = {weight.name: file for file, shard in shards.items() for weight in shard}
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _configs(
    config: ModelConfig, source: pathlib.Path | None, token_ids: dict, dtype: np.dtype
) -> dict[str, dict[str, Any]]:
    """generation_config.json and, last, config.json."""
    model = read_json(source / "config.json") if source else None
    generation = read_json_if_there(source / "generation_config.json") if source else {}
    model = config.to_huggingface(dtype.name, model) | token_ids
    ids = {key: model[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in model}
    return {"generation_config.json": ids | generation | token_ids, "config.json": model}


def _copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """The source's tokenizer, and nothing of an older one: a template that is left over might be taken before its."""
    for old in tokenizer_files(directory):
        old.unlink()
    for file in tokenizer_files(source):
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    safetensors.write_whole(file, lambda stream: stream.write(text.encode()))
