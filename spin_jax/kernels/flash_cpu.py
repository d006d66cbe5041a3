"""Attention of packed rows for CPUs: a loop over the tiles with something visible, in plain jax.numpy.

The same algorithm as the TPU's kernels (`flash_tpu.py`), for the same reason: of the scores of a packed row most are of
tokens that do not see each other, and all of them together do not fit a CPU's caches. All heads of a tile are one step.

Queries lie along the last axis of a tile, [keys, queries]. Sums and maxima over keys then run over whole vectors; and
the left side of every matmul has its summed axis last, which is how XLA's fast bfloat16 matmuls want it. The queries of
the G heads are never joined into one axis: whatever is indexed by a query's slot is indexed by a remainder then, and
XLA does not vectorise the exponentials beside it.

Shape letters: docs/architecture.md.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spin_jax.kernels.block_mask import ENDS, MASKED, POSITIONS, RESIDUALS, block_tokens, needed_tiles, walk_queries
from spin_jax.kernels.interface import Kernel

# Slots of a tile's edge. Small tiles hold less that is not visible and fit a core's caches; but each costs a step of a
# loop.
TILE = 64


def tiled_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_until_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    sliding_window: int | None,
    platform: str = "cpu",
) -> jax.Array:
    """What `flash_tpu.flash_attention` computes: [B, T, N, H] in q's dtype, differentiable in q, k, v. Any platform can
    compute it."""
    del platform
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    tokens_B2T = block_tokens(visible_until_BT, positions_BT, TILE)
    padding = ((0, 0), (0, tokens_B2T.shape[2] - length), (0, 0), (0, 0))

    def blocks(x: jax.Array, *heads: int) -> jax.Array:
        return jnp.moveaxis(jnp.pad(x, padding).reshape(batch, -1, TILE, *heads, head_dim), 2, -2)

    q_BIKGQH = blocks(q_BTNH, kv_heads, heads // kv_heads)
    k_BIKSH, v_BIKSH = (blocks(x, kv_heads) for x in (k_BTKH, v_BTKH))
    out_BIKGQH: Any = _attention(q_BIKGQH, k_BIKSH, v_BIKSH, tokens_B2T, sliding_window)
    return jnp.moveaxis(out_BIKGQH, -2, 2).reshape(batch, -1, heads, head_dim)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BIKGQH, k_BIKSH, v_BIKSH, tokens_B2T, sliding_window: int | None) -> jax.Array:
    """Attention of whole blocks, [B, I, K, G, Q, H]."""
    return _forward(q_BIKGQH, k_BIKSH, v_BIKSH, tokens_B2T, sliding_window)[0]


def _forward(q_BIKGQH, k_BIKSH, v_BIKSH, tokens_B2T, sliding_window: int | None) -> tuple[jax.Array, tuple]:
    """The output, and what the backward pass reads. Softmax of a block's queries, key block after key block, with the
    largest score so far for the largest of all."""
    needed_BIJ = needed_tiles(tokens_B2T, TILE, sliding_window)
    walk, _ = walk_queries(needed_BIJ)
    last_N = jnp.cumsum(needed_BIJ.sum(axis=2, dtype=jnp.int32))  # of the B I query blocks, where their steps end
    batch, blocks, kv_heads, groups, queries, head_dim = q_BIKGQH.shape
    values_BIKHS, dtype = v_BIKSH.swapaxes(3, 4), q_BIKGQH.dtype

    def attend_block(n, outs):
        row, i = jnp.divmod(n, blocks)
        q = _at(q_BIKGQH, row, i)

        def visit(step, sums):
            numerator, denominator, before = sums
            j = walk.j[step]
            scores = _scores(_at(k_BIKSH, row, j), q, _bias(tokens_B2T, row, i, j, sliding_window))
            largest = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights, decay = jnp.exp(scores - largest), jnp.exp(before - largest)
            added = _product("KHS,KSGQ->KHGQ", _at(values_BIKHS, row, j), weights.astype(dtype))
            return decay * numerator + added, decay * denominator + weights.sum(axis=1, keepdims=True), largest

        sums = (
            jnp.full((kv_heads, rows, groups, queries), of, jnp.float32)
            for rows, of in ((head_dim, 0), (1, 0), (1, MASKED))
        )
        first = jnp.where(n == 0, 0, last_N[n - 1])
        numerator, denominator, largest = jax.lax.fori_loop(first, last_N[n], visit, tuple(sums))
        news = ((numerator / denominator).astype(dtype), largest + jnp.log(denominator))
        return tuple(_put(out, new, row, i) for out, new in zip(outs, news, strict=True))

    outs = tuple(
        jnp.zeros((batch, blocks, kv_heads, rows, groups, queries), of)
        for rows, of in ((head_dim, dtype), (1, jnp.float32))
    )
    out_BIKHGQ, logsumexp_BIK1GQ = jax.lax.fori_loop(0, batch * blocks, attend_block, outs)
    out_BIKGQH = kept_bits(jnp.moveaxis(out_BIKHGQ, 3, -1), RESIDUALS)
    logsumexp_BIK1GQ = checkpoint_name(logsumexp_BIK1GQ, RESIDUALS)
    return out_BIKGQH, (q_BIKGQH, k_BIKSH, v_BIKSH, tokens_B2T, out_BIKGQH, logsumexp_BIK1GQ)


def _backward(sliding_window: int | None, residuals: tuple, do_BIKGQH: jax.Array) -> tuple:
    """Gradients of q, k and v (FlashAttention-2, arXiv 2307.08691, section 3.1)."""
    q_BIKGQH, k_BIKSH, v_BIKSH, tokens_B2T, out_BIKGQH, logsumexp_BIK1GQ = residuals
    # A matmul, of which XLA for CPUs makes less work than of a sum over products.
    out_and_do = (x.astype(jnp.float32) for x in (out_BIKGQH, do_BIKGQH))
    di_BIK1GQ = jnp.einsum("BIKGQH,BIKGQH->BIKGQ", *out_and_do)[:, :, :, None]
    walk, count = walk_queries(needed_tiles(tokens_B2T, TILE, sliding_window))
    dtype, scale, keys_BIKHS = q_BIKGQH.dtype, q_BIKGQH.shape[-1] ** -0.5, k_BIKSH.swapaxes(3, 4)

    def visit(step, sums):
        dq, dk, dv = sums
        row, i, j = walk.row[step], walk.i[step], walk.j[step]
        q, do, k, v = _at(q_BIKGQH, row, i), _at(do_BIKGQH, row, i), _at(k_BIKSH, row, j), _at(v_BIKSH, row, j)
        scores = _scores(k, q, _bias(tokens_B2T, row, i, j, sliding_window))
        weights = jnp.exp(scores - _at(logsumexp_BIK1GQ, row, i))
        products = _product("KSH,KGQH->KSGQ", v, do)
        gradient = (weights * (products - _at(di_BIK1GQ, row, i)) * scale).astype(dtype)
        dq = _put(dq, _at(dq, row, i) + _product("KHS,KSGQ->KHGQ", _at(keys_BIKHS, row, j), gradient), row, i)
        dk = _put(dk, _at(dk, row, j) + _product("KSGQ,KGQH->KSH", gradient, q), row, j)
        dv = _put(dv, _at(dv, row, j) + _product("KSGQ,KGQH->KSH", weights.astype(dtype), do), row, j)
        return dq, dk, dv

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (jnp.moveaxis(q_BIKGQH, -1, 3), k_BIKSH, v_BIKSH))
    dq_BIKHGQ, dk_BIKSH, dv_BIKSH = jax.lax.fori_loop(0, count, visit, sums)
    return *(x.astype(dtype) for x in (jnp.moveaxis(dq_BIKHGQ, 3, -1), dk_BIKSH, dv_BIKSH)), None


_attention.defvjp(_forward, _backward)


def _at(x: jax.Array, row: jax.Array, block: jax.Array) -> jax.Array:
    """x[row, block], a tile of all heads."""
    return jax.lax.dynamic_slice(x, (row, block, *(0,) * (x.ndim - 2)), (1, 1, *x.shape[2:]))[0, 0]


def _put(x: jax.Array, tile: jax.Array, row: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, tile[None, None], (row, block, *(0,) * (x.ndim - 2)))


def _product(expression: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(expression, left, right, preferred_element_type=jnp.float32)


def _scores(k_KSH: jax.Array, q_KGQH: jax.Array, bias_SQ: jax.Array) -> jax.Array:
    """k q / sqrt(H), and MASKED where the query does not see the key, f32 [K, S, G, Q]."""
    return _product("KSH,KGQH->KSGQ", k_KSH, q_KGQH) * q_KGQH.shape[-1] ** -0.5 + bias_SQ[None, :, None]


def _bias(tokens_B2T: jax.Array, row: jax.Array, i: jax.Array, j: jax.Array, sliding_window: int | None) -> jax.Array:
    """0 where queries of block i see keys of block j, else MASKED; [keys, queries]."""
    k_2S, q_2Q = (jax.lax.dynamic_slice(tokens_B2T, (row, 0, block * TILE), (1, 2, TILE))[0] for block in (j, i))
    slots_S = jnp.arange(TILE, dtype=jnp.int32)
    keys_S1, queries_1Q = (j * TILE + slots_S)[:, None], (i * TILE + slots_S)[None]
    visible = (keys_S1 <= queries_1Q) & (queries_1Q < k_2S[ENDS][:, None])
    if sliding_window is not None:
        visible &= q_2Q[POSITIONS][None] - k_2S[POSITIONS][:, None] < sliding_window
    return jnp.where(visible, 0.0, MASKED)


def kept_bits(x: jax.Array, name: str) -> jax.Array:
    """`checkpoint_name`, but keep bfloat16 as integers. Not differentiable.

    XLA for CPUs moves bfloat16 only as float32: each layer would convert what is kept of all layers, to and fro.
    """
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


tiled = Kernel(tiled_attention, platforms=("cpu",))
