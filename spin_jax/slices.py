"""The accelerator slices that a config can name, as in --config=configs/zephyr_7b.py:h100-8."""

from ml_collections import ConfigDict

from spin_jax.errors import UserError

# name -> devices. A TPU's number counts cores where a chip has two (v4, v5p), chips elsewhere; JAX sees a v4 or v5p
# chip as one device.
SLICES = {
    "cpu": 1,
    "h100-1": 1,
    "h100-8": 8,
    "v4-32": 16,
    "v5e-16": 16,
    "v5e-64": 64,
    "v5p-8": 4,
    "v5p-32": 16,
    "v6e-16": 16,
}


def use_slice(config: ConfigDict, name: str) -> None:
    """Set the mesh of `config` for a slice: everything over fsdp, which has the least exposed traffic for 7B models up
    to 16 chips.

    Raises:
        UserError: no such slice.
    """
    if name not in SLICES:
        raise UserError(f"{name!r} is not a slice: write one of {', '.join(SLICES)}")
    config.mesh.update(data=1, fsdp=SLICES[name], tensor=1)
