"""Rotary positions (RoPE, arXiv 2104.09864), plain and stretched for long contexts.

Shape letters: docs/architecture.md.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax.models.config import Llama3RopeScaling, ModelConfig


def rope_frequencies(config: ModelConfig, local: bool = False) -> np.ndarray:
    """Return the H/2 rotation frequencies, f32, in radians per position: theta^(-2i/H), scaled as config.py's classes
    say.

    Args:
        local: whether for layers with a sliding window, which may have another theta.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    # Compute in f32, as transformers does: after thousands of positions, another rounding is a visible angle.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(theta) ** exponents
    if scaling is None:
        return frequencies
    if not isinstance(scaling, Llama3RopeScaling):
        return frequencies / np.float32(scaling.factor)
    # Turns that a frequency makes within the original context, mapped to 0 for long wavelengths and 1 for short ones.
    turns = scaling.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
    short = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return ((1 - short) * frequencies / np.float32(scaling.factor) + short * frequencies).astype(np.float32)


def rope_tables(config: ModelConfig, positions_BT: jax.Array, local: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return (cos, sin) of the angle by which each of a head's H numbers is rotated, each f32 [B, T, 1, H]."""
    frequencies_H = np.tile(rope_frequencies(config, local), 2)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies_H[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array, scale: float = 1.0) -> jax.Array:
    """Rotate the pairs (x_i, x_{i + H/2}), Hugging Face's pairing, and multiply by `scale`, in f32.

    The result is x cos + x' sin with x' = (-second half, first half). Compute x' by a product with a signed
    permutation, which is exact. On a TPU half a vector is half a register, and cutting and concatenating would take
    four times as long.
    """
    half = x_BTNH.shape[-1] // 2
    turn_HH = np.zeros((2 * half, 2 * half))
    turn_HH[np.arange(half) + half, np.arange(half)] = -1
    turn_HH[np.arange(half), np.arange(half) + half] = 1
    turned_BTNH = jnp.einsum("BTNH,HI->BTNI", x_BTNH, jnp.asarray(turn_HH, x_BTNH.dtype), precision="highest")
    rotated_BTNH = x_BTNH.astype(jnp.float32) * cos + turned_BTNH.astype(jnp.float32) * sin
    return (rotated_BTNH if scale == 1 else rotated_BTNH * scale).astype(x_BTNH.dtype)
