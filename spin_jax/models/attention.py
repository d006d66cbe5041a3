"""softmax(q k / sqrt(H)) v of causal rows: in plain jax.numpy, and as each platform does it best, chosen by name.

The plain path holds the scores [B, N, T, S]; the others hold a tile of them at a time (FlashAttention, arXiv
2205.14135). Softmax runs in f32 in all of them.

Axes: B batch, T tokens, S key slots, N query heads, K kv heads, G = N // K, H head_dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from spin_jax.devices.compiler_options import gpu_capability
from spin_jax.errors import UserError
from spin_jax.kernels.flash_cpu import tiled_attention
from spin_jax.kernels.flash_gpu import cudnn_attention, tokamax_attention, tokamax_refusal
from spin_jax.kernels.flash_tpu import flash_attention
from spin_jax.models import kv_cache as cache_lib

# What config.model.attention may say; "auto" is the platform's kernel.
ATTENTION = ("auto", "plain", "tiled", "flash", "cudnn", "tokamax")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute attention by tiles, the devices it is compiled for, and how its arguments lie on them.

    Attributes:
        name: "tiled", "flash", "cudnn" or "tokamax".
        mesh: the devices. Elsewhere than on TPUs flash is interpreted, and on CPUs tokamax is plain XLA: for tests.
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
    name = kernel_name(asked, mesh.devices.flat[0], head_dim, dtype)
    return None if name == "plain" else Kernel(name, mesh, rows, heads)


def kernel_name(asked: str, device: jax.Device, head_dim: int, dtype: jnp.dtype) -> str:
    """The attention that `asked` means on a device; raises as `choose_kernel`. "auto" is plain where the platform's
    kernel cannot run."""
    name = {"tpu": "flash", "gpu": "cudnn"}.get(device.platform, "tiled") if asked == "auto" else asked
    reason = _refusal(name, device, head_dim, dtype)
    if reason and asked != "auto":
        raise UserError(f"--config.model.attention={name} {reason}: write --config.model.attention=plain, or auto")
    return "plain" if reason else name


def _refusal(name: str, device: jax.Device, head_dim: int, dtype: jnp.dtype) -> str | None:
    """Why a kernel cannot run, if so."""
    platform = device.platform
    if name not in ATTENTION:
        return "is not an attention"
    if name == "tokamax":
        return tokamax_refusal(device, head_dim, dtype)
    if name == "flash" and platform == "gpu":
        return f"is a TPU kernel and these devices are of platform {platform!r}"
    if name == "flash" and device.device_kind in ("TPU v2", "TPU v3"):
        return f"multiplies bfloat16 in its kernel, which a {device.device_kind} cannot"
    if name == "cudnn" and platform != "gpu":
        return f"is a GPU kernel and these devices are of platform {platform!r}"
    if name == "cudnn" and gpu_capability(device) < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0, and this {device.device_kind} has less"
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
    visible_until_BT: jax.Array | None,
    positions_BT: jax.Array,
    sliding_window: int | None,
    kernel: Kernel | None,
) -> jax.Array:
    """Attention of whole rows to themselves, [B, T, N, H] in q's dtype. Differentiable in q, k, v.

    Query i sees key j where j <= i < ends[j] and positions[i] - positions[j] < sliding_window. So one number a token
    says what sequences a row holds, and that two of them share a beginning (the causal case of FlashMask, arXiv
    2410.01359).

    Args:
        q_BTNH: N is a multiple of K: query heads [n G, (n + 1) G) share kv head n.
        visible_until_BT: int32, above j for token j; None where a row is one sequence.
        positions_BT: int32, places of the tokens in their sequences.
        kernel: from `choose_kernel`; None computes with jax.numpy. The kernel's mesh axes divide B, N and K.
    """
    if kernel is None:
        k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
        return attend(q_BTNH, k_BKHT, v_BKTH, causal_mask(visible_until_BT, positions_BT, sliding_window))
    if visible_until_BT is None:
        visible_until_BT = jnp.full(positions_BT.shape, positions_BT.shape[1], jnp.int32)
    if kernel.name == "flash":
        attention = functools.partial(flash_attention, interpret=kernel.mesh.devices.flat[0].platform != "tpu")
    elif kernel.name == "tiled":
        attention = tiled_attention
    elif kernel.name == "tokamax":
        on_gpu = kernel.mesh.devices.flat[0].platform == "gpu"
        attention = functools.partial(tokamax_attention, implementation="mosaic_gpu" if on_gpu else "xla")
    else:
        attention = functools.partial(dot_product, implementation="cudnn")
    attention = functools.partial(attention, sliding_window=sliding_window)
    # The partitioner cannot look into a kernel. No row or head needs another, so each device runs its own.
    rows, heads = PartitionSpec(kernel.rows), PartitionSpec(kernel.rows, None, kernel.heads, None)
    by_device = jax.shard_map(
        attention, mesh=kernel.mesh, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False
    )
    return by_device(q_BTNH, k_BTKH, v_BTKH, visible_until_BT, positions_BT)


def attend_cached(
    q_BTNH: jax.Array, cache: dict, layer: jax.Array | None, mask_BTS: jax.Array, columns: cache_lib.Columns
) -> jax.Array:
    """`attend` to what a layer has in a cache, in its dtype; columns before the first that counts are not read."""

    def from_column(first: int, q_BTNH: jax.Array, cache: dict, mask_BTS: jax.Array) -> jax.Array:
        seen = cache_lib.read(cache, layer, first)
        return attend(q_BTNH.astype(seen["v"].dtype), seen["kT"], seen["v"], mask_BTS[:, :, first:])

    branches = [functools.partial(from_column, first) for first in columns.starts]
    return jax.lax.switch(columns.start, branches, q_BTNH, cache, mask_BTS).astype(q_BTNH.dtype)


def attend(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(H)) v, [B, T, N, H]. Each of the K key heads serves G query heads without being repeated."""
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads, seen = v_BKSH.shape[1:3]
    # M is G and T as one axis: XLA on CPUs knows a batched matmul by one axis a side, and is slow at any other.
    q_BKMH = q_BTNH.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q_BKMH = q_BKMH.reshape(batch, kv_heads, -1, head_dim)
    scores_BKMS = jnp.einsum("BKMH,BKHS->BKMS", q_BKMH, k_BKHS, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKMS.reshape(batch, kv_heads, -1, length, seen) * head_dim**-0.5
    # A finite minimum: a query that sees nothing (beyond its cache) gives numbers nobody reads, not NaNs that spread.
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    weights_BKMS = weights_BKGTS.reshape(batch, kv_heads, -1, seen).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH).reshape(batch, kv_heads, -1, length, head_dim)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def attention_mask(queries_BT: jax.Array, keys_BS: jax.Array, sliding_window: int | None) -> jax.Array:
    """True where a query's position may see a key's, bool [B, T, S]: not ahead, nor further back than the window."""
    distance_BTS = queries_BT[:, :, None] - keys_BS[:, None, :]
    mask_BTS = distance_BTS >= 0
    return mask_BTS if sliding_window is None else mask_BTS & (distance_BTS < sliding_window)


def causal_mask(visible_until_BT: jax.Array | None, positions_BT: jax.Array, sliding_window: int | None) -> jax.Array:
    """What `causal_attention` says that a query sees, bool [B, T, T]."""
    slots_T = jnp.arange(positions_BT.shape[1], dtype=jnp.int32)
    mask_BTT = attention_mask(slots_T[None], slots_T[None], None)
    if visible_until_BT is not None:
        mask_BTT = mask_BTT & (slots_T[None, :, None] < visible_until_BT[:, None, :])
    if sliding_window is not None:
        mask_BTT = mask_BTT & (positions_BT[:, :, None] - positions_BT[:, None, :] < sliding_window)
    return mask_BTT


def dot_product(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_until_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    sliding_window: int | None,
    implementation: str,
) -> jax.Array:
    """`jax.nn.dot_product_attention` of packed rows; `implementation` is "cudnn", or "xla", which runs anywhere.

    cuDNN has no mask of this kind: it is written down, [B, 1, T, T], and no tile is skipped.
    """
    mask_B1TT = causal_mask(visible_until_BT, positions_BT, sliding_window)[:, None]
    if implementation == "cudnn":
        return cudnn_attention(q_BTNH, k_BTKH, v_BTKH, mask_B1TT)
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TT, implementation=implementation)
