"""Attention of packed rows on Hopper GPUs by the package tokamax.

Shape letters: docs/architecture.md.
"""

import importlib.util

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spin_jax.devices.accelerators import Device
from spin_jax.devices.compiler_options import gpu_capability
from spin_jax.kernels.interface import Kernel

TOKAMAX = "tokamax==0.0.17"  # the extra of setup.py: its masks by ranges have no public name, so the version is fixed


def refusal(device: Device, head_dim: int, dtype: DTypeLike) -> str | None:
    """Return why tokamax cannot compute attention on a device; None if it can. On CPUs it is plain XLA, for tests."""
    if device.platform == "tpu":
        return "is a GPU kernel and these devices are of platform 'tpu'"
    if importlib.util.find_spec("tokamax") is None:
        return f"needs a package that is not installed (on Python 3.12 or later: pip install {TOKAMAX})"
    if device.platform == "cpu":
        return None
    if gpu_capability(device) < (9, 0):
        return f"needs an NVIDIA GPU of compute capability 9.0, as H100 has, and this {device.device_kind} has less"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes 16-bit numbers, not {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:
        return f"is tested with a head_dim that is a multiple of 8 up to 128, not {head_dim}"
    return None


def tokamax_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_until_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    sliding_window: int | None,
    platform: str,
) -> jax.Array:
    """tokamax's flash attention, [B, T, N, H] in q's dtype; differentiable in q, k, v.

    On a `platform` of "gpu" these are kernels for Hopper and later, elsewhere plain XLA, for tests.

    `q_end` says which queries see a key; version 0.0.17 makes a mask of it. All kernels skip tiles by `is_causal`. The
    forward kernel also skips tiles before the first key that a query sees.
    """
    from tokamax._src.ops.attention import api, base  # pyright: ignore[reportMissingImports]  (an extra)

    slots_T = jnp.arange(visible_until_BT.shape[1], dtype=jnp.int32)
    # Let padding see itself: the kernels divide by the sum of a query's weights.
    visible_until_BT = jnp.maximum(visible_until_BT, slots_T[None] + 1)
    mask = base.Mask(q_end=visible_until_BT[:, None], k_start=first_seen(visible_until_BT)[:, None], is_causal=True)
    if sliding_window is not None:
        mask &= (positions_BT[:, :, None] - positions_BT[:, None, :] < sliding_window)[:, None]
    return api.IMPLEMENTATIONS["mosaic_gpu" if platform == "gpu" else "xla"](q_BTNH, k_BTKH, v_BTKH, mask=mask)


def first_seen(visible_until_BT: jax.Array) -> jax.Array:
    """Return the first slot that each slot sees, int32 [B, T]: the first whose `visible_until` is beyond it."""
    slots_T = jnp.arange(visible_until_BT.shape[1], dtype=jnp.int32)
    # The first end beyond a slot is where the largest end so far grows beyond it.
    largest_BT = jax.lax.cummax(visible_until_BT, axis=1)
    search = jax.vmap(lambda largest_T: jnp.searchsorted(largest_T, slots_T, side="right"))
    return search(largest_BT).astype(jnp.int32)


# Never "auto": nobody has timed it.
tokamax = Kernel(tokamax_attention, refusal)
