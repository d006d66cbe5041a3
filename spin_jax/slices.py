"""The accelerator slices that a config can name, as in --config=configs/zephyr_7b.py:h100-8, and their chips."""

import dataclasses

from ml_collections import ConfigDict

from spin_jax.errors import UserError

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, which is one device to JAX.

    Attributes:
        hbm_bytes: what a program can have, which is less than the data sheet says; 0 where nothing limits it but the
            machine.
        flops: matmul FLOP/s in bfloat16 at the peak.
        hbm_bytes_per_second: peak.
        ici_bytes_per_second: what a chip sends over one axis of its torus, both directions together.
        clock: Hz, at which the peak is reached; cycles of the compiler are turned into seconds with it.
    """

    name: str
    hbm_bytes: float
    flops: float = 0.0
    hbm_bytes_per_second: float = 0.0
    ici_bytes_per_second: float = 0.0
    clock: float = 0.0


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that work together.

    Attributes:
        devices: how many.
        topology: the name by which libtpu describes the slice without it; "" if it is not a TPU.
        options: what libtpu needs besides that name.
    """

    devices: int
    chip: Chip
    topology: str = ""
    options: tuple[tuple[str, str], ...] = ()


# FLOP/s, HBM and ICI: the pages v4, v5e, v5p and v6e of https://cloud.google.com/tpu/docs (ICI per chip there, divided
# by its ports, times the two of one axis). HBM: the limit in libtpu's own out-of-memory error. The clock is the peak
# divided by 2 x 128 x 128 FLOPs a cycle in each of 8 (v4), 4 (v5e), 8 (v5p) arrays, and 2 x 256 x 256 in 4 (v6e).
V4 = Chip("TPU v4", 30.75 * GiB, 275e12, 1200e9, 100e9, 1.05e9)
V5E = Chip("TPU v5e", 15.75 * GiB, 197e12, 819e9, 100e9, 1.5e9)
V5P = Chip("TPU v5p", 95.73 * GiB, 459e12, 2765e9, 200e9, 1.75e9)
V6E = Chip("TPU v6e", 31.24 * GiB, 918e12, 1640e9, 200e9, 1.75e9)
H100 = Chip("H100", 80e9, 989e12, 3350e9)
CPU = Chip("CPU", 0)

# A TPU's number counts cores where a chip has two (v4, v5p), chips elsewhere. "megacore" makes a v4 chip one device, as
# it is on the machine; libtpu's default description has one for each core.
SLICES = {
    "cpu": Slice(1, CPU),
    "h100-1": Slice(1, H100),
    "h100-8": Slice(8, H100),
    "v4-32": Slice(16, V4, "v4:2x2x4", (("chip_config_name", "megacore"),)),
    "v5e-8": Slice(8, V5E, "v5e:2x4"),
    "v5e-16": Slice(16, V5E, "v5e:4x4"),
    "v5e-64": Slice(64, V5E, "v5e:8x8"),
    "v5e-256": Slice(256, V5E, "v5e:16x16"),
    "v5p-8": Slice(4, V5P, "v5p:2x2x1"),
    "v5p-32": Slice(16, V5P, "v5p:2x2x4"),
    "v6e-16": Slice(16, V6E, "v6e:4x4"),
}


def find_slice(name: str) -> Slice:
    """The slice of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SLICES:
        raise UserError(f"{name!r} is not a slice: write one of {', '.join(SLICES)}")
    return SLICES[name]


def use_slice(config: ConfigDict, name: str) -> None:
    """Set the mesh of `config` for a slice: everything over fsdp, which has the least exposed traffic for 7B models, as
    far as each device has two pairs of a batch of 64 to fill a row with; beyond that over tensor. (On v5e-64 rows of
    one pair each are 55% full, and a step of zephyr_7b takes twice as long.) And the length of rows: on TPUs attention
    skips what no token sees, so that long rows cost no more than short ones and are filled better.

    Raises:
        UserError: no such slice.
    """
    target = find_slice(name)
    devices = target.devices
    tensor = max(1, devices // 32)
    config.mesh.update(data=1, fsdp=devices // tensor, tensor=tensor)
    if target.topology:
        config.train.row_length = 4096
