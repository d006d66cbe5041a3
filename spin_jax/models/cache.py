"""What a row has seen: its keys and values, as a dict of arrays that `models.forward` reads and writes.

    k, v                f32, bf16 or int8 [L, B, K, S, H]
    kT                  in the place of k, on CPUs: [L, B, K, H, S]
    k_scale, v_scale    f32 [L, B, K, S], with int8: the number is the int8 times its scale
    positions           int32 [B, S], of the tokens in the columns; NOWHERE where a column holds none

Columns stand beside head_dim, as the loop over tokens wants them: in any other order a TPU's compiler makes a second
cache to its taste, where it is not one head a chip. On CPUs a matmul takes its second operand with the summed axis in
front of the other, and transposes whole layers of keys in every step where it is not so.

Axes: L layers, B batch, S columns, K kv heads, H head_dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spin_jax.models.config import ModelConfig
from spin_jax.sharding import constrain

# The position of what no token may see: ahead of all of them, and far from overflow when positions are subtracted.
NOWHERE = 2**30


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
    config: ModelConfig, batch: int, columns: int, dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None
) -> dict:
    """An empty cache with keys and values of `dtype`, split over the devices of a mesh by rows and kv heads."""
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    shape = (config.num_layers, batch, config.num_kv_heads)

    def zeros(dtype: jnp.dtype, *of_each: int) -> jax.Array:
        x = jnp.zeros((*shape, *of_each), dtype)
        return constrain(x, mesh, *("layers", "rows", "kv_heads", None, None)[: x.ndim])

    keys = {"kT": (config.head_dim, columns)} if device.platform == "cpu" else {"k": (columns, config.head_dim)}
    cache = {name: zeros(dtype, *sizes) for name, sizes in (keys | {"v": (columns, config.head_dim)}).items()}
    if jnp.dtype(dtype) == jnp.int8:
        cache |= {name: zeros(jnp.float32, columns) for name in ("k_scale", "v_scale")}
    return cache | {"positions": jnp.full((batch, columns), NOWHERE, jnp.int32)}


def columns_axis(name: str) -> int:
    """Which axis of an array of the cache its columns are."""
    return {"positions": 1, "kT": 4}.get(name, 3)


def write(cache: dict, k_BTKH: jax.Array, v_BTKH: jax.Array, layer: jax.Array, column: jax.Array) -> dict:
    """The cache with T new keys and values from `column` on; in place where it is donated or carried by a loop."""
    new = {"k": k_BTKH.swapaxes(1, 2), "v": v_BTKH.swapaxes(1, 2)}
    if "k_scale" in cache:
        new["k"], new["k_scale"] = to_int8(new["k"])
        new["v"], new["v_scale"] = to_int8(new["v"])
    new["kT"] = new["k"].swapaxes(2, 3)

    def put(name: str, old: jax.Array) -> jax.Array:
        start = [0] * old.ndim
        start[0], start[columns_axis(name)] = layer, column
        return jax.lax.dynamic_update_slice(old, new[name].astype(old.dtype)[None], start)

    return {name: put(name, old) for name, old in cache.items()}


def read(cache: dict, layer: jax.Array, first: int) -> dict:
    """A layer's part of a cache from column `first` on: kT [B, K, H, S], v [B, K, S, H], scales [B, K, S]."""

    def part(name: str, x: jax.Array) -> jax.Array:
        start, size = [0] * x.ndim, list(x.shape)
        start[0], size[0] = layer, 1
        start[columns_axis(name)] = first
        size[columns_axis(name)] -= first
        return jax.lax.dynamic_slice(x, start, size)[0]

    parts = {name: part(name, x) for name, x in cache.items()}
    return parts if "kT" in parts else parts | {"kT": parts["k"].swapaxes(2, 3)}


def to_int8(x: jax.Array, axis: int | tuple[int, ...] = -1) -> tuple[jax.Array, jax.Array]:
    """(int8, f32 scale without `axis`) whose product is x to 1/254 of the largest along `axis` (absmax rounding)."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axis, keepdims=True)
    scale = jnp.maximum(largest, 1e-30) / 127  # not 0, where all of x is
    return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, axis)
