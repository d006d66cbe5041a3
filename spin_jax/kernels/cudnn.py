"""Attention of packed rows on GPUs by cuDNN, which computes all tiles under a mask.

Shape letters: docs/architecture.md.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spin_jax.devices.accelerators import Device
from spin_jax.devices.compiler_options import gpu_capability
from spin_jax.kernels.block_mask import causal_mask
from spin_jax.kernels.interface import Kernel

# Before this version jax makes cuDNN compute the gradient of the mask, a sum over heads of [T, T] that nobody reads.
_NO_MASK_GRADIENT = (0, 11, 1)


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_until_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    sliding_window: int | None,
    platform: str = "gpu",
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """cuDNN's fused attention, [B, T, N, H] in q's dtype; differentiable in q, k, v.

    cuDNN has no mask of this kind, so the mask is an array [B, 1, T, T], and no tile is skipped. For tests,
    `implementation="xla"` computes the same anywhere.
    """
    del platform
    mask_B1TT = causal_mask(visible_until_BT, positions_BT, sliding_window)[:, None]
    if implementation != "cudnn" or jax.__version_info__ >= _NO_MASK_GRADIENT:
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TT, implementation=implementation)
    # Do what that call does, without the mask's gradient. No public argument leaves it out: a mask becomes a bias, and
    # each bias has a gradient. The private function is the same in all older versions that setup.py allows.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    bias_B1TT = fused.combine_bias_and_mask(None, mask_B1TT, q_BTNH.dtype)
    lengths_offsets_pages = [jnp.zeros(0, q_BTNH.dtype)] * 6
    scale, seed, dropout, bias_and_its_gradient = q_BTNH.shape[-1] ** -0.5, 0, 0.0, (True, False)
    no_mask, layout = fused.MaskType.NO_MASK, fused.AttentionLayout.BTNH.value
    options = scale, seed, dropout, bias_and_its_gradient, no_mask, layout, None, fused.check_cudnn_version(), False
    return fused._dot_product_attention(q_BTNH, k_BTKH, v_BTKH, bias_B1TT, *lengths_offsets_pages, *options)


def _refusal(device: Device, head_dim: int, dtype: DTypeLike) -> str | None:
    if device.platform != "gpu":
        return f"is a GPU kernel and these devices are of platform {device.platform!r}"
    if gpu_capability(device) < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0, and this {device.device_kind} has less"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes 16-bit numbers, not {jnp.dtype(dtype).name}"
    # cuDNN takes up to 256 on Hopper; 128 is what every architecture takes.
    if head_dim % 8 or head_dim > 128:
        return f"takes a head_dim that is a multiple of 8 up to 128, not {head_dim}"
    return None


cudnn = Kernel(cudnn_attention, _refusal, platforms=("gpu",))
