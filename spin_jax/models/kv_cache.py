"""What a row has seen: its keys and values, as a dict of arrays that `models.forward` reads and writes.

    k, v         [L, B, K, S, H]
    kT           in the place of k, on CPUs: [L, B, K, H, S]
    positions    int32 [B, S], of the tokens in the columns; EMPTY_POSITION where a column holds none

Columns stand beside head_dim, as the loop over tokens wants them: in any other order a TPU's compiler makes a second
cache to its taste, where it is not one head a chip. On CPUs a matmul takes its second operand with the summed axis in
front of the other, and transposes whole layers of keys in every step where it is not so.

A cache by layer has tuples of L arrays in the place of the axis L, and so have the layers of params beside it. XLA for
CPUs updates and multiplies a whole array in place, and copies what is a part of one first.

Shape letters: docs/architecture.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spin_jax.devices.sharding import constrain
from spin_jax.models.config import ModelConfig

# The position of what no token may see: ahead of all of them, and far from overflow when positions are subtracted.
EMPTY_POSITION = 2**30


@functools.partial(jax.tree_util.register_dataclass, data_fields=["written", "start"], meta_fields=["starts"])
@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a cache a call of `forward` writes and reads.

    Attributes:
        written: int32; its T tokens fill this column and the T - 1 after it, the same in every row. (A column of its
            own for each row would be a scatter, which TPUs run row by row.)
        starts: columns that the reading may begin at, ascending from 0: one branch is compiled for each.
        start: int32, which of them it is: no token sees a column before it.
    """

    written: jax.Array | int = 0
    starts: tuple[int, ...] = (0,)
    start: jax.Array | int = 0


def init_cache(
    config: ModelConfig,
    batch: int,
    columns: int,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    *,
    by_layer: bool = False,
) -> dict:
    """An empty cache with keys and values of `dtype`, split over the devices of a mesh by rows and kv heads. A cache by
    layer is for one device."""
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    layers, of_layer = config.num_layers, (batch, config.num_kv_heads)

    def zeros(*sizes: int) -> jax.Array | tuple[jax.Array, ...]:
        if by_layer:
            return tuple(jnp.zeros((*of_layer, *sizes), dtype) for _ in range(layers))
        return constrain(jnp.zeros((layers, *of_layer, *sizes), dtype), mesh, "layers", "rows", "kv_heads", None, None)

    keys = {"kT": (config.head_dim, columns)} if device.platform == "cpu" else {"k": (columns, config.head_dim)}
    cache = {name: zeros(*sizes) for name, sizes in (keys | {"v": (columns, config.head_dim)}).items()}
    return cache | {"positions": jnp.full((batch, columns), EMPTY_POSITION, jnp.int32)}


def cache_dtype(compute_dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """The dtype of keys and values beside matmuls in `compute_dtype`: the same, but float32 on CPUs, where XLA converts
    all that it reads of a bfloat16 cache in every step."""
    return jnp.dtype(jnp.float32 if platform == "cpu" else compute_dtype)


def rows_axis(name: str, x: jax.Array) -> int:
    """Which axis of an array of the cache its rows are."""
    return 0 if name == "positions" else x.ndim - 4


def columns_axis(name: str, x: jax.Array) -> int:
    """Which axis of an array of the cache its columns are."""
    return x.ndim - 1 if name in ("positions", "kT") else x.ndim - 2


def write(cache: dict, k_BTKH: jax.Array, v_BTKH: jax.Array, layer: jax.Array | None, column: jax.Array | int) -> dict:
    """The cache with T new keys and values from `column` on; in place where it is donated or carried by a loop.

    Args:
        cache: without positions.
        layer: None where the cache is that of one layer alone.
    """
    new = {"k": k_BTKH.swapaxes(1, 2), "v": v_BTKH.swapaxes(1, 2), "kT": k_BTKH.transpose(0, 2, 3, 1)}

    def put(name: str, old: jax.Array) -> jax.Array:
        start: list[jax.Array | int] = [0] * old.ndim
        start[columns_axis(name, old)] = column
        of_layer = new[name].astype(old.dtype)
        if layer is not None:
            start[0], of_layer = layer, of_layer[None]
        return jax.lax.dynamic_update_slice(old, of_layer, start)

    return {name: put(name, old) for name, old in cache.items()}


def read(cache: dict, layer: jax.Array | None, first: int) -> dict:
    """A layer's part of a cache from column `first` on: kT [B, K, H, S], v [B, K, S, H]."""

    def part(name: str, x: jax.Array) -> jax.Array:
        start: list[jax.Array | int] = [0] * x.ndim
        size = list(x.shape)
        start[columns_axis(name, x)] = first
        size[columns_axis(name, x)] -= first
        if layer is None:
            return jax.lax.dynamic_slice(x, start, size)
        start[0], size[0] = layer, 1
        return jax.lax.dynamic_slice(x, start, size)[0]

    parts = {name: part(name, x) for name, x in cache.items()}
    return parts if "kT" in parts else parts | {"kT": parts["k"].swapaxes(2, 3)}
