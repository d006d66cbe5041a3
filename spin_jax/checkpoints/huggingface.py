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
    """One tensor of a checkpoint: a weight of the model, or that of one layer."""

    name: str
    path: tuple[str, ...]
    layer: int | None
    weight: Weight


def tensors_of(config: ModelConfig, of: dict | None = None) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, those of a layer together, in the order of the table of weights, or of another
    table `of` the model."""
    table: dict[tuple, Any] = dict(flatten_dict(weights(config) if of is None else of))
    of_layers = {path: table.pop(path) for path in list(table) if path[0] == "layers"}
    for path, weight in table.items():
        yield Tensor(weight.name, path, None, weight)
    for layer in range(config.num_layers):
        for path, weight in of_layers.items():
            yield Tensor(stored_name(weight, layer), path, layer, weight)


def stored_name(weight: Weight, layer: int) -> str:
    return f"model.layers.{layer}.{weight.name}"


def their_shape(weight: Weight) -> tuple[int, ...]:
    if weight.inputs is None:
        return weight.shape
    outputs = math.prod(weight.shape[weight.inputs :])
    return (outputs, math.prod(weight.shape[: weight.inputs])) if weight.inputs else (outputs,)


def to_ours(weight: Weight, theirs: np.ndarray) -> np.ndarray:
    """Always a view, so that a mapped tensor stays unread: axes are swapped, then split."""
    return (theirs.T if weight.inputs else theirs).reshape(weight.shape)


def to_theirs(weight: Weight, ours: np.ndarray) -> np.ndarray:
    shape = their_shape(weight)
    return ours.reshape(shape[::-1]).T if weight.inputs else ours.reshape(shape)


def load(
    path_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: jnp.dtype = jnp.float32,
    shardings: dict | None = None,
) -> tuple[ModelConfig, dict]:
    """Reads a checkpoint of a supported family; `models.weights.weights` describes the tree.

    Args:
        path_or_id: a directory with config.json and safetensors, or a Hub repository.
        revision: branch, tag or commit of a Hub repository.
        dtype: of the params, whatever the file's; norm scales are float32, as `models.cast_params` leaves them.
        shardings: a tree of jax.sharding.Sharding like the params'; each process reads only its own devices' slices.
            None: everything on this process's first device.

    Raises:
        UserError: not found, not supported, the tensors are not those that config.json describes, or one is not finite.
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
        # Waiting lets go of this param's host copy before the next is read.
        return jax.block_until_ready(jax.make_array_from_callback(param.shape, sharding, cast(Any, read)))

    return config, jax.tree.map_with_path(place, weights(config), abstract, shardings)


def _reader(
    weight: Weight, stored: dict[str, safetensors.StoredTensor], param: jax.ShapeDtypeStruct, stacked: bool
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function that reads slices of a param. Devices that hold the same slice share one copy of it."""
    slices: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, param.shape, strict=True))
        if bounds not in slices:
            out = slices[bounds] = np.empty([stop - start for start, stop in bounds], param.dtype)
            layers, parts, index = (index[0], out, index[1:]) if stacked else (slice(None), out[None], index)
            for part, (name, tensor) in zip(parts, list(stored.items())[layers], strict=True):
                with np.errstate(over="ignore"):  # it is refused below
                    part[...] = to_ours(weight, tensor.map())[index]
                if not _all_finite(part):
                    raise UserError(
                        f"{tensor.file}: {name} holds values that are not finite in {part.dtype}; download it again, "
                        "or name a checkpoint from before its training failed"
                    )
        return slices[bounds]

    return read


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
    token_ids: Mapping[str, int | list[int]] | None = None,
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
        # Files of an older model that were not replaced go, lest they be read instead.
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
    """Writes a file of tensors under their names, each fetched from `params` when its turn comes; all processes must
    call it, and the first one writes."""
    fetched = (_fetch(tensor, params, dtype) for tensor in tensors.values())
    if multihost.is_first():
        shapes = {name: their_shape(tensor.weight) for name, tensor in tensors.items()}
        theirs = (to_theirs(one.weight, np.asarray(x)) for one, x in zip(tensors.values(), fetched, strict=True))
        safetensors.write(file, shapes, dtype, theirs)
    else:
        for ours in fetched:  # take part in the gathering, of one tensor at a time
            jax.block_until_ready(ours)


def holds(directory: str | os.PathLike, config: ModelConfig, params: dict) -> bool:
    """Whether a directory holds these very weights, a tensor at a time; f32, as `save` writes them with that dtype."""
    stored = stored_tensors(directory)

    def is_same(tensor: Tensor) -> bool:
        ours = to_theirs(tensor.weight, np.asarray(_fetch(tensor, params, jnp.float32)))
        return tensor.name in stored and np.array_equal(stored[tensor.name].map(), ours, equal_nan=True)

    return all(map(is_same, tensors_of(config)))


def check_tensors(directory: pathlib.Path, config: ModelConfig, stored: dict[str, safetensors.StoredTensor]) -> None:
    """The checkpoint holds the tensors that config.json describes, and nothing else that would be lost."""
    expected = {tensor.name: their_shape(tensor.weight) for tensor in tensors_of(config)}
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


def _fetch(tensor: Tensor, params: dict, dtype: np.dtype) -> np.ndarray | jax.Array:
    """One tensor in our layout, on the devices of all hosts, from wherever its shards are."""
    param: Any = functools.reduce(dict.__getitem__, tensor.path, params)
    ours = (param if tensor.layer is None else param[tensor.layer]).astype(dtype)
    return gathered(ours) if isinstance(ours, jax.Array) else ours


def _configs(
    config: ModelConfig, source: pathlib.Path | None, token_ids: dict[str, Any], dtype: np.dtype
) -> dict[str, dict[str, Any]]:
    """generation_config.json and, last, config.json."""
    model = read_json(source / "config.json") if source else None
    generation = read_json_if_there(source / "generation_config.json") if source else {}
    model = {**config.to_huggingface(dtype.name, model), **token_ids}
    ids = {key: model[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in model}
    return {"generation_config.json": {**ids, **generation, **token_ids}, "config.json": model}


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """The source's tokenizer, and nothing of an older one: a template that is left over might be taken before its."""
    for old in tokenizer_files(directory):
        old.unlink()
    for file in tokenizer_files(source):
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    safetensors.write_whole(file, lambda stream: stream.write(text.encode()))
