"""softmax(q k / sqrt(H)) v of causal rows: in plain jax.numpy, and as the kernels of TPUs and GPUs, chosen by name.

The plain path holds the scores [B, N, T, S]; the kernels hold a tile of them at a time (FlashAttention, arXiv
2205.14135). Softmax runs in f32 in all of them.

Axes: B batch, T tokens, S key slots, N query heads, K kv heads, G = N // K, H head_dim.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec

from spin_jax.errors import UserError

# What config.model.attention may say; "auto" is the platform's kernel.
ATTENTION = ("auto", "plain", "splash", "cudnn")

# The splash kernel's output and logsumexp carry this name: a remat policy that saves it spares the backward pass a
# second run of the forward kernel.
SPLASH_RESIDUALS = "splash_residuals"

# A tile's edge in tokens, at most: rows are cut into the fewest equal tiles. Larger tiles fetch keys less often and
# skip less of what causality hides. At 512 a tile's f32 scores are 1 MiB, and the forward and backward kernels compile
# into the 16 MiB of vector memory that a v4 or v5e program may use, up to H = 256 in f32; at 2048 they do not. 512 is
# also MaxText's default (base.yml, sa_block_*). Nothing here was timed.
LARGEST_TILE = 512
LANES = 128  # of a TPU's vector unit: tiles are a multiple


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An attention kernel, the devices it is compiled for, and how its arguments lie on them.

    Attributes:
        name: "splash" or "cudnn".
        mesh: the devices. On a mesh without TPUs splash is interpreted: exact, slow, for tests.
        rows: mesh axes that the batch is split over.
        heads: mesh axis that query heads and kv heads are split over.
    """

    name: str
    mesh: Mesh
    rows: tuple[str, ...]
    heads: str


def choose_kernel(
    asked: str, mesh: Mesh, rows: tuple[str, ...], heads: str, *, head_dim: int, dtype: jnp.dtype
) -> Kernel | None:
    """The kernel that `asked`, one of ATTENTION, means on this mesh; None is the plain path.

    The platform is that of the mesh's devices, not of the process: a program for TPUs can be compiled where none is.

    Raises:
        UserError: a kernel was asked for by name that cannot run.
    """
    platform = mesh.devices.flat[0].platform
    name = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "plain") if asked == "auto" else asked
    reason = _refusal(name, platform, head_dim, dtype)
    if reason and asked != "auto":
        raise UserError(f"config.model.attention={name!r} {reason}: use 'plain' or 'auto'")
    return None if reason or name == "plain" else Kernel(name, mesh, rows, heads)


def _refusal(name: str, platform: str, head_dim: int, dtype: jnp.dtype) -> str | None:
    """Why a kernel cannot run, if so."""
    if name not in ATTENTION:
        return "is not an attention"
    if name == "splash" and platform == "gpu":
        return f"is a TPU kernel and these devices are of platform {platform!r}"
    if name == "cudnn" and platform != "gpu":
        return f"is a GPU kernel and these devices are of platform {platform!r}"
    if name == "cudnn" and dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes 16-bit numbers, not {jnp.dtype(dtype).name}"
    # cuDNN takes up to 256 on Hopper; 128 is what every architecture takes.
    if name == "cudnn" and (head_dim % 8 or head_dim > 128):
        return f"takes a head_dim that is a multiple of 8 up to 128, not {head_dim}"
    return None


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    sliding_window: int | None = None,
    kernel: Kernel | None = None,
) -> jax.Array:
    """Attention of whole rows to themselves, [B, T, N, H] in q's dtype.

    Query i sees key j where j <= i, i - j < `sliding_window`, and both are of one segment. Differentiable in q, k, v.

    Args:
        q_BTNH: N is a multiple of K: query heads [n G, (n + 1) G) share kv head n.
        segments_BT: int32, which of the sequences packed into its row a token belongs to; None where a row is one.
        kernel: from `choose_kernel`; None computes with jax.numpy. The kernel's mesh axes divide B, N and K.
    """
    if kernel is None:
        return attend(q_BTNH, k_BTKH, v_BTKH, _causal_mask(q_BTNH.shape[1], sliding_window, segments_BT))
    if kernel.name == "splash":
        interpret = kernel.mesh.devices.flat[0].platform != "tpu"
        attention = functools.partial(_splash, sliding_window=sliding_window, interpret=interpret)
    else:
        attention = functools.partial(dot_product, sliding_window=sliding_window, implementation="cudnn")
    # The partitioner cannot look into a kernel. No row or head needs another, so each device runs its own.
    heads = PartitionSpec(kernel.rows, None, kernel.heads, None)
    specs = (heads, heads, heads, PartitionSpec(kernel.rows, None))
    by_device = jax.shard_map(attention, mesh=kernel.mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return by_device(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(H)) v, [B, T, N, H]. Each of the K key heads serves G query heads without being repeated."""
    batch, length, heads, head_dim = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, k_BSKH.shape[2], -1, head_dim)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKGTS * head_dim**-0.5
    # A finite minimum: a query that sees nothing (beyond its cache) gives numbers nobody reads, not NaNs that spread.
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(batch, length, heads, head_dim)


def attention_mask(queries_BT: jax.Array, keys_BS: jax.Array, sliding_window: int | None) -> jax.Array:
    """True where a query's position may see a key's, bool [B, T, S]: not ahead, nor further back than the window."""
    distance_BTS = queries_BT[:, :, None] - keys_BS[:, None, :]
    mask_BTS = distance_BTS >= 0
    return mask_BTS if sliding_window is None else mask_BTS & (distance_BTS < sliding_window)


def _causal_mask(length: int, sliding_window: int | None, segments_BT: jax.Array | None) -> jax.Array:
    """What `causal_attention` says that a query sees, bool [B or 1, T, T]."""
    positions_1T = jnp.arange(length, dtype=jnp.int32)[None]
    mask_BTT = attention_mask(positions_1T, positions_1T, sliding_window)
    return mask_BTT if segments_BT is None else mask_BTT & (segments_BT[:, :, None] == segments_BT[:, None, :])


def _splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    sliding_window: int | None,
    interpret: bool,
) -> jax.Array:
    """Splash attention of one device's rows and heads."""
    length, heads, head_dim = q_BTNH.shape[1:]
    tiles = math.ceil(length / LARGEST_TILE)
    tile = math.ceil(length / tiles / LANES) * LANES
    # Padding on the right is ahead of every query, so it changes none of them.
    padding = tiles * tile - length
    # The kernel does not scale, and wants heads before tokens: XLA lays the projections out so, without a copy.
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        for x in (q_BTNH * head_dim**-0.5, k_BTKH, v_BTKH)
    )
    segments = None
    if segments_BT is not None:
        segments_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
        segments = splash.SegmentIds(q=segments_BT, kv=segments_BT)
    kernel = _splash_kernel(heads, tiles, tile, sliding_window, interpret)
    attended_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)
    return attended_BNTH[:, :, :length].swapaxes(1, 2)


@functools.cache
def _splash_kernel(
    heads: int, tiles: int, tile: int, sliding_window: int | None, interpret: bool
) -> splash.SplashAttentionKernel:
    """The kernel of one row of T = tiles * tile: q [N, T, H], k and v [K, T, H], segment ids [T] -> [N, T, H]."""
    shape = (tiles * tile, tiles * tile)
    if sliding_window is None:
        mask = splash_mask.CausalMask(shape)
    else:
        mask = splash_mask.LocalMask(shape, window_size=(sliding_window - 1, 0), offset=0)
    blocks = splash.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
        # Two backward kernels, one for dq and one for dk and dv, compute 7 products a tile; one for all computes 5, and
        # leaves `tiles` partial sums of dq, whose sum the compiler expects to take longer than the two products.
        use_fused_bwd_kernel=False,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash_mask.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SPLASH_RESIDUALS,
            interpret=interpret,
        )
    # As numpy, the kernel's tables of tiles are constants of whatever program it is traced into, for any device.
    return jax.tree.map(np.asarray, kernel)


def dot_product(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    sliding_window: int | None,
    implementation: str,
) -> jax.Array:
    """`jax.nn.dot_product_attention` of causal rows; `implementation` is "cudnn", or "xla", which runs anywhere."""
    if segments_BT is None:
        visible = {"local_window_size": None if sliding_window is None else (sliding_window - 1, 0)}
    else:
        # cuDNN has no segments: they go into a mask [B, 1, T, T]. Before 9.10.2 it takes no window beside a mask.
        visible = {"mask": _causal_mask(q_BTNH.shape[1], sliding_window, segments_BT)[:, None]}
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation=implementation, **visible
    )
