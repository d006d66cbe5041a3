"""FlashAttention of packed rows: forward and backward kernels for TPUs, in Pallas.

Scores exist a tile of queries by keys at a time (FlashAttention, arXiv 2205.14135). A kernel gets the list of tiles
with a visible entry (`block_mask.py`), and its grid is as long as the list. Other tiles are neither fetched nor
computed, and cost no grid step.

Shape letters: docs/architecture.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from spin_jax.devices.accelerators import Device
from spin_jax.kernels.block_mask import (
    ENDS,
    MASKED,
    POSITIONS,
    RESIDUALS,
    Walk,
    block_tokens,
    needed_tiles,
    walk_keys,
    walk_queries,
)
from spin_jax.kernels.interface import Kernel

# A tile's edge in slots, and how many heads a step computes where they divide so. In libtpu's schedules for a v5e (bf16
# and H = 128) the three kernels take 1,320 cycles a head and tile, of which matmuls alone would take 1,150; with one
# head a step 1,750, as no softmax hides behind another head's matmuls. A tile of 512 takes 4,850, one of 128 takes 550;
# packed rows of 2,048 slots with pairs of 330 to 1,500 need 2.6 times as many tiles of 256 as of 512, and 2.8 times as
# many of 128 as of 256. Nothing was timed.
TILE = 256
HEADS = 4
LANES = 128  # of a TPU's vector unit


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static settings of a kernel.

    Attributes:
        tile: S, slots of a block, a multiple of LANES.
        kv_heads: of a grid step, each with the `groups` query heads that share it.
        sliding_window: in positions; None: unlimited.
        interpret: run as jax.numpy.
    """

    tile: int
    kv_heads: int
    groups: int
    sliding_window: int | None
    interpret: bool

    @property
    def heads(self) -> int:
        """Query heads of a grid step."""
        return self.kv_heads * self.groups


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_until_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    sliding_window: int | None,
    platform: str = "tpu",
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the keys that a slot sees, [B, T, N, H] in q's dtype. Differentiable in q, k, v.

    Softmax and sums are f32. A slot sees itself whatever its end. Rows may have any length: they are padded to whole
    tiles for the kernels.

    Args:
        q_BTNH: N is a multiple of K: query heads [n G, (n + 1) G) share kv head n.
        visible_until_BT: int32, the first slot that no longer sees this one.
        positions_BT: int32, places of the tokens in their sequences, which repeat where two of them share a beginning.
        sliding_window: how many of these places a token sees, its own and those before it; None: all.
        platform: elsewhere than on a "tpu" the kernels are interpreted: exact, slow, for tests.
    """
    length, heads, head_dim = q_BTNH.shape[1:]
    kv_heads, tile = heads_and_tile(heads, k_BTKH.shape[2], head_dim, q_BTNH.dtype)
    tiling = Tiling(tile, kv_heads, heads // k_BTKH.shape[2], sliding_window, platform != "tpu")
    tokens_B2T = block_tokens(visible_until_BT, positions_BT, tile)
    padding = tokens_B2T.shape[2] - length
    # Heads before tokens: XLA lays the projections out so, without a copy.
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    out_BNTH: Any = _attention(q_BNTH, k_BKTH, v_BKTH, tokens_B2T, tiling)
    return out_BNTH[:, :, :length].swapaxes(1, 2)


def heads_and_tile(heads: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """(kv heads of a step, a tile's edge in slots) for the heads that a device has."""
    groups = heads // kv_heads
    of_step = math.gcd(kv_heads, max(1, HEADS // groups))
    # With more than 1 MiB of queries a step the kernels may outgrow the 16 MiB of a v4's vector memory.
    fits = TILE * of_step * groups * head_dim * jnp.dtype(dtype).itemsize <= 2**20
    return of_step, TILE if fits else TILE // 2


# Kernels. A step is one tile of some heads. Scores lie [queries, keys], and [keys, queries] where keys' gradients are
# summed, so that no matmul has its left side transposed: `axis` is the one along which queries lie.


class Inputs(NamedTuple):
    """What kernels read: arrays, the specs of their blocks, or refs of a step's blocks, whose shapes these are.

    Attributes:
        q, do: [heads, S, H] of query block i.
        k, v: [kv_heads, S, H] of key block j.
        q_tokens, k_tokens: int32 [2, S], ENDS and POSITIONS of the blocks' slots.
        logsumexp, di: f32 [heads, 1, S] of query block i: log of the softmax's denominator; sum(out do) over H.
    """

    q: Any
    k: Any
    v: Any
    q_tokens: Any
    k_tokens: Any
    do: Any = None
    logsumexp: Any = None
    di: Any = None


def _begins_and_ends(walk: Walk, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether a step is the first of its block, and the last. Blocks end on the diagonal."""
    before = jnp.maximum(step - 1, 0)
    return (step == 0) | (walk.i[before] == walk.j[before]), walk.i[step] == walk.j[step]


def _along(x_S: jax.Array, axis: int) -> jax.Array:
    """As a column (axis 0) or row of a tile."""
    return jnp.expand_dims(x_S, 1 - axis)


def _visible(walk: Walk, step: jax.Array, at: Inputs, tiling: Tiling, axis: int) -> jax.Array:
    """Which queries of a step's tile see which keys."""
    shape = (tiling.tile, tiling.tile)
    queries = walk.i[step] * tiling.tile + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    keys = walk.j[step] * tiling.tile + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
    visible = (keys <= queries) & (queries < _along(at.k_tokens[ENDS], 1 - axis))
    if tiling.sliding_window is not None:
        distance = _along(at.q_tokens[POSITIONS], axis) - _along(at.k_tokens[POSITIONS], 1 - axis)
        visible &= distance < tiling.sliding_window
    return visible


def _products(queries_QH: jax.Array, keys_SH: jax.Array, axis: int) -> jax.Array:
    """Inner products over H, f32."""
    left, right = (queries_QH, keys_SH) if axis == 0 else (keys_SH, queries_QH)
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _sums(weights: jax.Array, values_SH: jax.Array) -> jax.Array:
    """Weighted sums of values, f32 [S, H]. The weights are rounded to the values' dtype."""
    return jnp.dot(weights.astype(values_SH.dtype), values_SH, preferred_element_type=jnp.float32)


def _scores(q_QH: jax.Array, k_SH: jax.Array, visible: jax.Array, axis: int) -> jax.Array:
    """q k / sqrt(H), MASKED where the query does not see the key."""
    return jnp.where(visible, _products(q_QH, k_SH, axis) * q_QH.shape[1] ** -0.5, MASKED)


def _over_lanes(x: jax.Array, width: int) -> jax.Array:
    """[S, width] of [S, LANES] whose columns are all the same."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def _forward_kernel(walk, at, out_ref, logsumexp_ref, max_ref, denominator_ref, numerator_ref, *, tiling):
    """Softmax of a query block, key block after key block, with the largest score so far for the largest of all.

    Scratch of a head: that score, the same in all lanes [S, LANES]; the denominator, a part of it in each lane
    [S, LANES]; the numerator [S, H].
    """
    step = pl.program_id(1)
    begins, ends = _begins_and_ends(walk, step)
    visible = _visible(walk, step, at, tiling, axis=0)
    for n in range(tiling.heads):
        scores = _scores(at.q[n], at.k[n // tiling.groups], visible, axis=0)
        before = jnp.where(begins, MASKED, max_ref[n])
        largest = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        # While a query has seen no key, what it sums is of masked ones. The first visible key multiplies that by 0.
        weights = jnp.exp(scores - _over_lanes(largest, tiling.tile))
        decay = jnp.exp(before - largest)
        max_ref[n] = largest
        parts = jnp.split(weights, tiling.tile // LANES, axis=1)
        denominator_ref[n] = decay * jnp.where(begins, 0, denominator_ref[n]) + sum(parts)
        numerator = jnp.where(begins, 0, numerator_ref[n])
        numerator_ref[n] = _over_lanes(decay, numerator.shape[1]) * numerator + _sums(weights, at.v[n // tiling.groups])

    @pl.when(ends)
    def write():
        for n in range(tiling.heads):
            denominator = denominator_ref[n].sum(axis=1, keepdims=True)
            out_ref[n] = (numerator_ref[n] / denominator).astype(out_ref.dtype)
            logsumexp_ref[n] = (max_ref[n, :, :1] + jnp.log(denominator)).T


def _softmax_gradient(at: Inputs, n: int, kv: int, visible: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Weights p of query head n on kv head `kv`, and the gradient of its scores, p (do v - di)."""
    scores = _scores(at.q[n], at.k[kv], visible, axis)
    weights = jnp.exp(scores - _along(at.logsumexp[n, 0], axis))
    return weights, weights * (_products(at.do[n], at.v[kv], axis) - _along(at.di[n, 0], axis))


def _dq_kernel(walk, at, dq_ref, sum_ref, *, tiling):
    """Gradient of a query block, summed over key blocks."""
    step = pl.program_id(1)
    begins, ends = _begins_and_ends(walk, step)
    visible = _visible(walk, step, at, tiling, axis=0)
    for n in range(tiling.heads):
        kv = n // tiling.groups
        _, gradient = _softmax_gradient(at, n, kv, visible, axis=0)
        sum_ref[n] = jnp.where(begins, 0, sum_ref[n]) + _sums(gradient, at.k[kv])

    @pl.when(ends)
    def write():
        dq_ref[...] = (sum_ref[...] * dq_ref.shape[-1] ** -0.5).astype(dq_ref.dtype)


def _dkv_kernel(walk, at, dk_ref, dv_ref, dk_sum_ref, dv_sum_ref, *, tiling):
    """Gradients of a key block, summed over query blocks and the G heads that share it."""
    step = pl.program_id(1)
    begins, ends = _begins_and_ends(walk, step)
    visible = _visible(walk, step, at, tiling, axis=1)
    for kv in range(tiling.kv_heads):
        dk, dv = (jnp.where(begins, 0, ref[kv]) for ref in (dk_sum_ref, dv_sum_ref))
        for n in range(kv * tiling.groups, (kv + 1) * tiling.groups):
            weights, gradient = _softmax_gradient(at, n, kv, visible, axis=1)
            dk += _sums(gradient, at.q[n])
            dv += _sums(weights, at.do[n])
        dk_sum_ref[kv], dv_sum_ref[kv] = dk, dv

    @pl.when(ends)
    def write():
        dk_ref[...] = (dk_sum_ref[...] * dk_ref.shape[-1] ** -0.5).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


# Calls


def _specs(tiling: Tiling, head_dim: int) -> Inputs:
    """Which block of each array a step is given. The grid is (heads, in parts; steps of the walk)."""

    def spec(shape: tuple[int | None, ...], place: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda heads, s, walk: place(heads, walk.row[s], walk.i[s], walk.j[s]))

    query = spec((None, tiling.heads, tiling.tile, head_dim), lambda heads, row, i, j: (row, heads, i, 0))
    key = spec((None, tiling.kv_heads, tiling.tile, head_dim), lambda heads, row, i, j: (row, heads, j, 0))
    scalar = spec((None, tiling.heads, 1, tiling.tile), lambda heads, row, i, j: (row, heads, 0, i))
    q_tokens = spec((None, 2, tiling.tile), lambda heads, row, i, j: (row, 0, i))
    k_tokens = spec((None, 2, tiling.tile), lambda heads, row, i, j: (row, 0, j))
    return Inputs(query, key, key, q_tokens, k_tokens, do=query, logsumexp=scalar, di=scalar)


def _call(
    kernel: Callable,
    walk_and_count: tuple[Walk, jax.Array],
    inputs: Inputs,
    outputs: tuple[str, ...],
    scratch: tuple[int, ...],
    matmuls: int,
    tiling: Tiling,
) -> list[jax.Array]:
    """Run a kernel along a walk.

    Args:
        outputs: fields of `Inputs` whose shape, dtype and place theirs are; first one whose blocks are summed.
        scratch: widths of f32 [heads or kv_heads, S, width].
        matmuls: of a head and tile.
    """
    walk, count = walk_and_count
    batch, heads, length, head_dim = inputs.q.shape
    shapes = inputs._replace(logsumexp=jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32))
    out_shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (getattr(shapes, name) for name in outputs)]
    specs = _specs(tiling, head_dim)
    in_specs = Inputs(*(None if x is None else spec for x, spec in zip(inputs, specs, strict=True)))
    of_queries = outputs[0] == "q"
    sums = tiling.heads if of_queries else tiling.kv_heads
    # What the compiler is told is of rows that hold one sequence each: no tile of the past is left out. How many are,
    # `share_of_causal` says.
    scores = heads * walk.row.size * tiling.tile**2
    fetched = (inputs.k, inputs.v) if of_queries else (inputs.q, inputs.do)  # at each step
    bytes_fetched = sum(x.nbytes // x.shape[0] // (length // tiling.tile) * walk.row.size for x in fetched)
    bytes_written = sum(math.prod(x.shape) * x.dtype.itemsize for x in out_shapes)
    return pl.pallas_call(
        functools.partial(kernel, tiling=tiling),
        name="flash" + kernel.__name__.removesuffix("_kernel"),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads // tiling.heads, count),
            in_specs=[in_specs],
            out_specs=[getattr(specs, name) for name in outputs],
            scratch_shapes=[pltpu.VMEM((sums, tiling.tile, width), jnp.float32) for width in scratch],
        ),
        out_shape=out_shapes,
        # The two cores of a v4 or v5p chip share the heads.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=scores * matmuls * 2 * head_dim, transcendentals=scores, bytes_accessed=bytes_fetched + bytes_written
        ),
        interpret=tiling.interpret,
    )(walk, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BNTH, k_BKTH, v_BKTH, tokens_B2T, tiling: Tiling) -> jax.Array:
    """Attention of whole blocks, heads before tokens, [B, N, T, H]."""
    return _forward(q_BNTH, k_BKTH, v_BKTH, tokens_B2T, tiling)[0]


def _forward(q_BNTH, k_BKTH, v_BKTH, tokens_B2T, tiling: Tiling) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output, and what the backward pass reads."""
    inputs = Inputs(q_BNTH, k_BKTH, v_BKTH, tokens_B2T, tokens_B2T)
    walk = walk_queries(needed_tiles(tokens_B2T, tiling.tile, tiling.sliding_window))
    scratch = (LANES, LANES, q_BNTH.shape[3])
    attended = _call(_forward_kernel, walk, inputs, ("q", "logsumexp"), scratch, 2, tiling)
    out_BNTH, logsumexp_BN1T = checkpoint_name(attended, RESIDUALS)
    return out_BNTH, (q_BNTH, k_BKTH, v_BKTH, tokens_B2T, out_BNTH, logsumexp_BN1T)


def _backward(tiling: Tiling, residuals: tuple[jax.Array, ...], do_BNTH: jax.Array) -> tuple:
    """Gradients of q, k and v (FlashAttention-2, arXiv 2307.08691, section 3.1)."""
    q_BNTH, k_BKTH, v_BKTH, tokens_B2T, out_BNTH, logsumexp_BN1T = residuals
    di_BN1T = jnp.sum(out_BNTH.astype(jnp.float32) * do_BNTH.astype(jnp.float32), axis=-1)[:, :, None]
    inputs = Inputs(q_BNTH, k_BKTH, v_BKTH, tokens_B2T, tokens_B2T, do_BNTH, logsumexp_BN1T, di_BN1T)
    needed_BIJ = needed_tiles(tokens_B2T, tiling.tile, tiling.sliding_window)
    head_dim = q_BNTH.shape[3]
    (dq_BNTH,) = _call(_dq_kernel, walk_queries(needed_BIJ), inputs, ("q",), (head_dim,), 3, tiling)
    dkv = _call(_dkv_kernel, walk_keys(needed_BIJ), inputs, ("k", "v"), (head_dim, head_dim), 4, tiling)
    return dq_BNTH, *dkv, None


_attention.defvjp(_forward, _backward)


def _refusal(device: Device, head_dim: int, dtype: DTypeLike) -> str | None:
    if device.platform == "gpu":
        return "is a TPU kernel and these devices are of platform 'gpu'"
    if device.device_kind in ("TPU v2", "TPU v3"):
        return f"multiplies bfloat16 in its kernel, which a {device.device_kind} cannot"
    return None


# Rows cost no more by being long: what no token sees is skipped.
flash = Kernel(flash_attention, _refusal, platforms=("tpu",), row_length=4096)
