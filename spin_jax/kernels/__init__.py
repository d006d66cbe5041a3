"""Attention of packed rows by tiles. A kernel is one file, and one entry here; `config.model.attention` names it."""

from spin_jax.registry import Registry

# "auto" asks the last one first.
KERNELS: Registry = Registry(
    {
        "tokamax": "spin_jax.kernels.tokamax:tokamax",
        "cudnn": "spin_jax.kernels.cudnn:cudnn",
        "flash": "spin_jax.kernels.flash_tpu:flash",
        "tiled": "spin_jax.kernels.flash_cpu:tiled",
    }
)
