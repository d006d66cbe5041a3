"""The KV cache: keys and values that rows have seen, as a dict of arrays that `models.forward` reads and writes.

    k, v         [L, B, K, S, H]
    kT           on CPUs, in the place of k: [L, B, K, H, S]
    positions    int32 [B, S], of the tokens in the columns; EMPTY_POSITION where a column holds none

Columns (S) stand next to head_dim, as the loop over tokens reads them. With any other order a TPU's compiler makes a
second cache in that one, unless each chip has a single head. On CPUs keys are transposed: a matmul there wants the
summed axis of its second operand in front, and would transpose whole layers of keys in every step.

A cache by layer has tuples of L arrays instead of an axis L, and so have the layers of the params that go with it. XLA
for CPUs updates and multiplies a whole array in place, but copies a part of an array first.

Shape letters: docs/architecture.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spin_jax.devices.sharding import constrain
from spin_jax.models.config import ModelConfig

# The position of columns that no token may see: ahead of all tokens, and small enough to subtract without overflow.
EMPTY_POSITION = 2**30


@functools.partial(jax.tree_util.register_dataclass, data_fields=["written", "start"], meta_fields=["starts"])
@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a cache a call of `forward` writes and reads.

    Attributes:
        written: int32; the call's T tokens fill this column and the T - 1 after it, the same ones in every row. (A
            column for each row would be a scatter, which TPUs run row by row.)
        starts: columns at which reading may begin, ascending from 0. A branch is compiled for each.
        start: int32, index into `starts`. No token sees a column before it.
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
    """Make an empty cache with keys and values of `dtype`. Rows and kv heads are split over the devices of a mesh; a
    cache by layer is for one device."""
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
    """Return the dtype of keys and values: `compute_dtype`, but float32 on CPUs, where XLA would convert all that it
    reads of a bfloat16 cache in every step."""
    return jnp.dtype(jnp.float32 if platform == "cpu" else compute_dtype)


def rows_axis(name: str, x: jax.Array) -> int:
    """Return the axis of a cache's array that holds rows."""
    return 0 if name == "positions" else x.ndim - 4


def columns_axis(name: str, x: jax.Array) -> int:
    """Return the axis of a cache's array that holds columns."""
    return x.ndim - 1 if name in ("positions", "kT") else x.ndim - 2


def write(cache: dict, k_BTKH: jax.Array, v_BTKH: jax.Array, layer: jax.Array | None, column: jax.Array | int) -> dict:
    """Write T keys and values to a cache, from `column` on: in place if the cache is donated, or carried by a loop.

    Args:
        cache: without positions.
        layer: None if the cache has one layer alone, and no axis L.
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
    """Return a layer's keys and values from column `first` on: kT [B, K, H, S], v [B, K, S, H]."""

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
