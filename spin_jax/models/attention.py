"""Attention, softmax(q k / sqrt(H)) v: of whole rows, in jax.numpy or by a kernel of `spin_jax.kernels`; of a cache.

The plain path holds the scores [B, N, T, S]; kernels hold a tile of them at a time (FlashAttention, arXiv 2205.14135).
Softmax runs in f32 in all of them.

Shape letters: docs/architecture.md.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spin_jax.devices.sharding import spec
from spin_jax.kernels import KERNELS
from spin_jax.kernels.block_mask import causal_mask
from spin_jax.models import kv_cache as cache_lib


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_until_BT: jax.Array | None,
    positions_BT: jax.Array,
    sliding_window: int | None,
    kernel: str | None,
    mesh: Mesh,
) -> jax.Array:
    """Return the attention of rows to themselves, [B, T, N, H] in q's dtype. Differentiable in q, k, v.

    Query i sees key j if j <= i < visible_until[j] and positions[i] - positions[j] < sliding_window. So one number for
    each token describes which sequences a row holds, also sequences that share a beginning (the causal case of
    FlashMask, arXiv 2410.01359).

    Args:
        q_BTNH: N is a multiple of K: query heads [n G, (n + 1) G) share kv head n.
        visible_until_BT: int32, above j for token j; None where a row is one sequence.
        positions_BT: int32, places of the tokens in their sequences.
        kernel: name in `kernels.KERNELS`; None computes with jax.numpy.
        mesh: the devices that a kernel is compiled for, whose axes divide B, N and K.
    """
    if kernel is None:
        k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
        return attend(q_BTNH, k_BKHT, v_BKTH, causal_mask(visible_until_BT, positions_BT, sliding_window))
    assert mesh is not None, "a kernel is compiled for a mesh"
    if visible_until_BT is None:
        visible_until_BT = jnp.full(positions_BT.shape, positions_BT.shape[1], jnp.int32)
    attention = functools.partial(
        KERNELS[kernel].attention, sliding_window=sliding_window, platform=mesh.devices.flat[0].platform
    )
    # The partitioner cannot split a kernel. Rows and heads do not depend on each other, so each device runs its own.
    rows, heads = spec("rows"), spec("rows", None, "heads", None)
    by_device = jax.shard_map(
        attention, mesh=mesh, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False
    )
    return by_device(q_BTNH, k_BTKH, v_BTKH, visible_until_BT, positions_BT)


def attend_cached(
    q_BTNH: jax.Array, cache: dict, layer: jax.Array | None, mask_BTS: jax.Array, columns: cache_lib.Columns
) -> jax.Array:
    """`attend` to a layer's keys and values in a cache, in the cache's dtype. Do not read columns before
    `columns.starts[columns.start]`."""

    def from_column(first: int, q_BTNH: jax.Array, cache: dict, mask_BTS: jax.Array) -> jax.Array:
        seen = cache_lib.read(cache, layer, first)
        return attend(q_BTNH.astype(seen["v"].dtype), seen["kT"], seen["v"], mask_BTS[:, :, first:])

    branches = [functools.partial(from_column, first) for first in columns.starts]
    return jax.lax.switch(columns.start, branches, q_BTNH, cache, mask_BTS).astype(q_BTNH.dtype)


def attend(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(H)) v, [B, T, N, H]. Each of the K key heads serves G query heads without being repeated."""
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads, seen = v_BKSH.shape[1:3]
    # Merge G and T into one axis M: XLA for CPUs has a fast batched matmul for one free axis a side only.
    q_BKMH = q_BTNH.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q_BKMH = q_BKMH.reshape(batch, kv_heads, -1, head_dim)
    scores_BKMS = jnp.einsum("BKMH,BKHS->BKMS", q_BKMH, k_BKHS, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKMS.reshape(batch, kv_heads, -1, length, seen) * head_dim**-0.5
    # Mask with a finite minimum: a query that sees nothing then gives numbers that nobody reads, not NaNs that spread.
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    weights_BKMS = weights_BKGTS.reshape(batch, kv_heads, -1, seen).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH).reshape(batch, kv_heads, -1, length, head_dim)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
