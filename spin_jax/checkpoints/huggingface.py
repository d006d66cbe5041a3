"""Load and save Hugging Face model directories, whose tensors have other names and layouts than params have here.

Loading copies only the slices that this host's devices hold; saving fetches one tensor at a time. So neither needs more
host memory than this host's params and one tensor.
"""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from spin_jax.checkpoints import safetensors
from spin_jax.checkpoints.directory import INDEX, read_config, resolve, stored_tensors, tokenizer_files
from spin_jax.devices.transfer import gathered
from spin_jax.errors import UserError
from spin_jax.models import ModelConfig, abstract_params, cast_params
from spin_jax.models.weights import Weight, weights
from spin_jax.runtime import multihost
from spin_jax.runtime.files import find, read_json, read_json_if_there


class Tensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        name: in the checkpoint.
        path: of the param in the tree.
        layer: index along the param's first axis; None where the param is not stacked over layers.
        weight: its entry in the table of weights.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    weight: Weight


def tensors_of(config: ModelConfig, table: dict | None = None) -> Iterator[Tensor]:
    """Yield every tensor of a checkpoint, layer by layer, in the order of a table of weights.

    Args:
        table: the model's own, or another one of its tree, such as that of low-rank updates.
    """
    by_path: dict[tuple, Any] = dict(flatten_dict(weights(config) if table is None else table))
    of_layers = {path: by_path.pop(path) for path in list(by_path) if path[0] == "layers"}
    for path, weight in by_path.items():
        yield Tensor(weight.name, path, None, weight)
    for layer in range(config.num_layers):
        for path, weight in of_layers.items():
            yield Tensor(stored_name(weight, layer), path, layer, weight)


def stored_name(weight: Weight, layer: int) -> str:
    """A layer's weight in Hugging Face checkpoints."""
    return f"model.layers.{layer}.{weight.name}"


def stored_shape(weight: Weight) -> tuple[int, ...]:
    """The shape of a weight in checkpoints: [outputs, inputs] of a matmul, [outputs] of a bias, else its own."""
    if weight.inputs is None:
        return weight.shape
    outputs = math.prod(weight.shape[weight.inputs :])
    return (outputs, math.prod(weight.shape[: weight.inputs])) if weight.inputs else (outputs,)


def from_stored(weight: Weight, stored: np.ndarray) -> np.ndarray:
    """View a stored tensor in the shape that params have. It is never copied: a mapped file stays unread."""
    return (stored.T if weight.inputs else stored).reshape(weight.shape)


def to_stored(weight: Weight, param: np.ndarray) -> np.ndarray:
    """The inverse of `from_stored`: view a param, or one layer of it, in the shape that checkpoints have."""
    shape = stored_shape(weight)
    return param.reshape(shape[::-1]).T if weight.inputs else param.reshape(shape)


def load(
    path_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: jnp.dtype = jnp.float32,
    shardings: dict | None = None,
) -> tuple[ModelConfig, dict]:
    """Read a checkpoint of a supported family, as (description, params); `models.weights.weights` describes the tree.

    Args:
        path_or_id: a directory with config.json and safetensors, or a Hub repository.
        revision: branch, tag or commit of a Hub repository.
        dtype: of the params, whatever the files have. Norm scales stay float32, as in `models.cast_params`.
        shardings: tree of jax.sharding.Sharding like the params. Each process reads only its devices' slices. None
            puts everything on this process's first device.

    Raises:
        UserError: the model is not found or not supported, its tensors are not those that config.json describes, or
            one has a value that is not finite.
    """
    directory = resolve(path_or_id, revision)
    config = read_config(directory)
    stored = stored_tensors(directory)
    check_tensors(directory, config, stored)

    abstract = jax.eval_shape(functools.partial(cast_params, config, dtype=dtype), abstract_params(config))
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)

    def place(path: tuple, weight: Weight, param: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        stacked = path[0].key == "layers"
        names = [stored_name(weight, layer) for layer in range(config.num_layers)] if stacked else [weight.name]
        read = _reader(weight, {name: stored[name] for name in names}, param, stacked)
        # Wait, so that this param's host copy is freed before the next one is read.
        return jax.block_until_ready(jax.make_array_from_callback(param.shape, sharding, cast(Any, read)))

    return config, jax.tree.map_with_path(place, weights(config), abstract, shardings)


def _reader(
    weight: Weight, stored: dict[str, safetensors.StoredTensor], param: jax.ShapeDtypeStruct, stacked: bool
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Make a function that reads a slice of a param, once for all devices that hold it.

    Args:
        stored: the param's tensors by name: one for each layer if `stacked`, else a single one.
    """
    slices: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, param.shape, strict=True))
        if bounds not in slices:
            out = slices[bounds] = np.empty([stop - start for start, stop in bounds], param.dtype)
            layers, parts, index = (index[0], out, index[1:]) if stacked else (slice(None), out[None], index)
            for part, (name, tensor) in zip(parts, list(stored.items())[layers], strict=True):
                with np.errstate(over="ignore"):  # what overflows in `dtype` is refused below
                    part[...] = from_stored(weight, tensor.map())[index]
                if not _all_finite(part):
                    raise UserError(
                        f"{tensor.file}: {name} holds values that are not finite in {part.dtype}; download it again, "
                        "or name a checkpoint from before its training failed"
                    )
        return slices[bounds]

    return read


def _all_finite(x: np.ndarray) -> bool:
    """Whether all numbers are finite, found without a copy: read as an integer, infinity and NaN are the largest
    numbers of their sign."""
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
    token_ids: Mapping[str, int | list[int]] | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a directory that `load` and transformers (4 and 5) read.

    Write config.json last, so that a directory with a config.json is complete. Each file is written under another name
    and renamed when whole.

    If params are split over several processes, all of them must call this. Process 0 writes, a tensor at a time, and
    returns last.

    Args:
        source: directory of the model that training started from. Copy its tokenizer, and keep what its config.json and
            generation_config.json say beyond the architecture.
        token_ids: bos_token_id, eos_token_id and pad_token_id to write instead of the source's.
        dtype: float32, float16 or bfloat16. Casting back to the dtype that the weights were loaded from is exact.
        max_shard_bytes: largest size of a file. A tensor is never split: one that is larger has a file of its own.

    Raises:
        UserError: `directory` is `source`, `source` is not a model (any more), or `dtype` is none of the three.
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

    from huggingface_hub import split_state_dict_into_shards_factory

    configs = multihost.on_process_zero(lambda: _configs(config, source, dict(token_ids or {}), dtype))
    writes = multihost.is_first()
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
    tensors = {tensor.name: tensor for tensor in tensors_of(config)}
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: math.prod(tensor.weight.shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(directory / file, {name: tensors[name] for name in names}, params, dtype)
    if writes:
        # Delete files of an older model that were not replaced: they might be read in place of these.
        for old in (*find(directory, "model*.safetensors"), *find(directory, INDEX)):
            if old.name not in split.filename_to_tensors and not old.is_dir():
                old.unlink()
        if split.is_sharded:
            write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        if source is not None:
            copy_tokenizer(source, directory)
        for name, content in configs.items():
            write_json(directory / name, content)


def write_tensors(file: pathlib.Path, tensors: Mapping[str, Tensor], params: dict, dtype: np.dtype) -> None:
    """Write tensors of `params` to a file, fetching one at a time. All processes must call it; process 0 writes.

    Args:
        tensors: by the names to write them under.
    """
    if multihost.is_first():
        shapes = {name: stored_shape(tensor.weight) for name, tensor in tensors.items()}
        safetensors.write(file, shapes, dtype, (_fetch_stored(tensor, params, dtype) for tensor in tensors.values()))
    else:
        for tensor in tensors.values():  # take part in gathering each
            jax.block_until_ready(_fetch(tensor, params, dtype))


def holds(directory: str | os.PathLike, config: ModelConfig, params: dict) -> bool:
    """Whether a directory holds exactly these weights in float32. Compare a tensor at a time, to need little memory."""
    stored = stored_tensors(directory)

    def is_same(tensor: Tensor) -> bool:
        expected = _fetch_stored(tensor, params, np.dtype(np.float32))
        return tensor.name in stored and np.array_equal(stored[tensor.name].map(), expected, equal_nan=True)

    return all(map(is_same, tensors_of(config)))


def check_tensors(directory: pathlib.Path, config: ModelConfig, stored: dict[str, safetensors.StoredTensor]) -> None:
    """Refuse a checkpoint whose tensors are not those that config.json describes.

    Raises:
        UserError: a tensor is missing, has another shape, or would be ignored.
    """
    expected = {tensor.name: stored_shape(tensor.weight) for tensor in tensors_of(config)}
    if missing := [name for name in expected if name not in stored]:
        hint = "is config.json that of these weights?"
        if missing == ["lm_head.weight"]:
            hint = "if it is the embedding, set tie_word_embeddings to true in config.json"
        raise UserError(f"{directory}: {_count(missing)} missing; {hint}")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(f"{directory}: {name} has the shape {stored[name].shape}; config.json says {shape}")
    # Old versions of transformers also wrote the rotary frequencies, which are constants.
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


def _fetch(tensor: Tensor, params: dict, dtype: np.dtype) -> np.ndarray | jax.Array:
    """Fetch one tensor in the layout of params, gathered on the devices of every host. All processes must call it."""
    param: Any = functools.reduce(dict.__getitem__, tensor.path, params)
    param = (param if tensor.layer is None else param[tensor.layer]).astype(dtype)
    return gathered(param) if isinstance(param, jax.Array) else param


def _fetch_stored(tensor: Tensor, params: dict, dtype: np.dtype) -> np.ndarray:
    """`_fetch` to the host, in the layout of checkpoints."""
    return to_stored(tensor.weight, np.asarray(_fetch(tensor, params, dtype)))


def _configs(
    config: ModelConfig, source: pathlib.Path | None, token_ids: dict[str, Any], dtype: np.dtype
) -> dict[str, dict[str, Any]]:
    """{name: content} of generation_config.json and config.json, in the order in which to write them."""
    model = read_json(source / "config.json") if source else None
    generation = read_json_if_there(source / "generation_config.json") if source else {}
    model = {**config.to_huggingface(dtype.name, model), **token_ids}
    ids = {key: model[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in model}
    return {"generation_config.json": {**ids, **generation, **token_ids}, "config.json": model}


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copy the source's tokenizer, and delete all files of an older one: a template left over might be read instead."""
    for old in tokenizer_files(directory):
        old.unlink()
    for file in tokenizer_files(source):
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    safetensors.write_whole(file, lambda stream: stream.write(text.encode()))
