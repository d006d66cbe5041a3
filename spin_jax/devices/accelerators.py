"""Accelerators: those that a config can name, as in --config=configs/zephyr_7b.py:v5e-16, and those of this machine."""

import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict

from spin_jax.errors import UserError

GiB = 2**30


class Device(Protocol):
    """The attributes that are read of a `jax.Device`, or of a described device."""

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...

    def memory_stats(self) -> dict[str, Any] | None: ...


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them: a chip, or one of the two cores of a TPU v2, v3 or 7x.

    Attributes:
        hbm_bytes: memory for programs, which is less than the data sheet says; 0 if it is not limited.
        flops: peak matmul FLOP/s in bfloat16 (float16 on GPUs without it).
        hbm_bytes_per_second: peak.
        ici_bytes_per_second: what a device sends over one axis of its torus, in both directions together.
        clock: Hz at the peak, to turn the compiler's cycles into seconds.
    """

    name: str
    hbm_bytes: float
    flops: float = 0.0
    hbm_bytes_per_second: float = 0.0
    ici_bytes_per_second: float = 0.0
    clock: float = 0.0


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices that work together.

    Attributes:
        devices: how many.
        topology: name by which libtpu describes the slice to a machine that does not have it; "" if it is not a TPU.
        options: what libtpu needs besides that name.
    """

    devices: int
    chip: Chip
    topology: str = ""
    options: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Generation:
    """TPUs of one kind.

    Attributes:
        kind: `jax.Device.device_kind`.
        cores: how many a chip counts as in a slice's name: v4-8 is four chips.
        devices: how many a chip is to JAX.
        largest: chips of the largest slice.
        axes: of the torus.
    """

    chip: Chip
    kind: str
    cores: int
    devices: int
    largest: int
    axes: int


# FLOP/s, HBM and ICI: the pages of https://cloud.google.com/tpu/docs, of a device (ICI per chip there, divided by its
# ports, times the two of one axis; v2 and v3: arXiv 1909.09756). HBM: the limit in libtpu's own out-of-memory error.
# The clock is the peak divided by the FLOPs a cycle of the matrix units: 2 x 128 x 128 in each of 1 (v2), 2 (v3),
# 8 (v4), 4 (v5e), 8 (v5p) arrays, 2 x 256 x 256 in each of 4 (v6e, and v7x as far as we can tell).
V2 = Chip("TPU v2", 7.48 * GiB, 22.5e12, 350e9, 62e9, 0.7e9)
V3 = Chip("TPU v3", 15.48 * GiB, 61.5e12, 450e9, 82e9, 0.94e9)
V4 = Chip("TPU v4", 30.75 * GiB, 275e12, 1200e9, 100e9, 1.05e9)
V5E = Chip("TPU v5e", 15.75 * GiB, 197e12, 819e9, 100e9, 1.5e9)
V5P = Chip("TPU v5p", 95.73 * GiB, 459e12, 2765e9, 200e9, 1.75e9)
V6E = Chip("TPU v6e", 31.24 * GiB, 918e12, 1640e9, 200e9, 1.75e9)
V7X = Chip("TPU7x", 94.75 * GiB, 1153.5e12, 3690e9, 100e9, 2.2e9)
CPU = Chip("CPU", 0)

TPUS = {
    "v2": Generation(V2, "TPU v2", 2, 2, 256, 2),
    "v3": Generation(V3, "TPU v3", 2, 2, 1024, 2),
    "v4": Generation(V4, "TPU v4", 2, 1, 4096, 3),
    "v5e": Generation(V5E, "TPU v5 lite", 1, 1, 256, 2),
    "v5p": Generation(V5P, "TPU v5", 2, 1, 6144, 3),
    "v6e": Generation(V6E, "TPU v6 lite", 1, 1, 256, 2),
    "tpu7x": Generation(V7X, "TPU7x", 2, 2, 2048, 3),
}
_ALIASES = {"v5litepod": "v5e"}  # Google's name of the type

# XLA reserves a share of a GPU's memory when it starts. Our commands set it to this.
GPU_MEMORY_SHARE = 0.92
# name: (pattern, bytes, FLOP/s of dense matmuls, bytes a second), from data sheets. The first pattern that is found in
# a device's kind, such as "NVIDIA A100-SXM4-80GB", names the GPU.
_GPUS = {
    "t4": (r"\bT4\b", 16e9, 65e12, 320e9),
    "v100": (r"V100", 16e9, 125e12, 900e9),
    "l4": (r"\bL4\b", 24e9, 121e12, 300e9),
    "l40s": (r"L40S", 48e9, 362e12, 864e9),
    "a10g": (r"A10G", 24e9, 70e12, 600e9),
    "rtx3090": (r"RTX 3090", 24e9, 71e12, 936e9),
    "rtx4090": (r"RTX 4090", 24e9, 165e12, 1008e9),
    "a100-80gb": (r"A100.*80GB", 80e9, 312e12, 2039e9),
    "a100": (r"A100", 40e9, 312e12, 1555e9),
    "h100": (r"H100", 80e9, 989e12, 3350e9),
    "h200": (r"H200", 141e9, 989e12, 4800e9),
    "b200": (r"B200", 180e9, 2250e12, 8000e9),
}
GPUS = {
    name: Chip(name.upper(), GPU_MEMORY_SHARE * memory, flops, bandwidth)
    for name, (_, memory, flops, bandwidth) in _GPUS.items()
}


def find_slice(name: str) -> Slice:
    """Return the slice of a name: "cpu", a TPU's type, such as "v5e-16", or GPUs and their number, such as "h100-8".

    Raises:
        UserError: there is no such slice.
    """
    if name == "cpu":
        return Slice(1, CPU)
    kind, _, number = name.rpartition("-")
    kind = _ALIASES.get(kind, kind)
    if number.isdecimal() and kind in TPUS:
        return _tpu_slice(name, TPUS[kind], kind, int(number))
    if number.isdecimal() and kind in GPUS and int(number) > 0:
        return Slice(int(number), GPUS[kind])
    raise UserError(
        f"{name!r} is not a slice: write a TPU's type, as v5e-16 (of {', '.join(TPUS)}), GPUs and their number, as "
        f"h100-8 (of {', '.join(GPUS)}), or cpu"
    )


def is_slice(name: str) -> bool:
    """Whether `find_slice` knows the name."""
    try:
        return bool(find_slice(name))
    except UserError:
        return False


def smallest(hbm_bytes: float) -> list[str]:
    """Return the smallest slice of each kind of TPU whose devices have so many bytes together."""
    names = []
    for kind, one in TPUS.items():
        enough = (size for size in _sizes(one) if size * one.devices * one.chip.hbm_bytes > hbm_bytes)
        if (size := next(enough, None)) is not None:
            names.append(f"{kind}-{size * one.cores}")
    return names


def _tpu_slice(name: str, generation: Generation, kind: str, number: int) -> Slice:
    sizes = _sizes(generation)
    chips = number // generation.cores
    if chips * generation.cores != number or chips not in sizes:
        near = sorted(sorted(sizes, key=lambda size: abs(math.log(size / max(chips, 1))))[:3])
        there = ", ".join(f"{kind}-{size * generation.cores}" for size in near)
        raise UserError(f"{name!r} is not a slice: near to it are {there}")
    shape = _torus(chips, generation.axes)
    options: tuple[tuple[str, Any], ...] = ()
    if chips == 1:  # libtpu assumes four chips on a host
        options = (("chips_per_host_bounds", (1, 1, 1)),)
    if kind == "v4":  # a chip is one device, as on the machine; by default libtpu describes one for each core
        options = (("chip_config_name", "megacore"),)
    return Slice(chips * generation.devices, generation.chip, f"{kind}:{'x'.join(map(str, shape))}", options)


def _sizes(generation: Generation) -> list[int]:
    """Return the sizes of slices, in chips: powers of two, and in three dimensions also multiples of a cube of 64."""
    smallest = 1 if generation.cores == 1 else 4
    powers = [2**i for i in range(13) if smallest <= 2**i <= generation.largest and 2**i != 2]
    cubes = range(64, generation.largest + 1, 64) if generation.axes == 3 else ()
    unsquare = {8} if generation.cores == 2 and generation.axes == 2 else set()  # v2 and v3 have none of 2 x 4
    return sorted({*powers, *cubes} - unsquare)


def _torus(chips: int, axes: int) -> tuple[int, ...]:
    """Return the shape nearest to a square or cube. From 64 chips on, the sides of a cube are multiples of four."""
    if axes == 3 and chips == 4:
        return (2, 2, 1)
    step = 1 if axes == 2 else 2 if chips < 64 else 4
    sides = range(step, chips + 1, step)
    shapes = itertools.combinations_with_replacement([side for side in sides if chips % side == 0], axes)
    return min((shape for shape in shapes if math.prod(shape) == chips), key=lambda shape: shape[-1])


# ---- what is there


def found(devices: Sequence[Device]) -> Slice:
    """Describe `jax.devices()` as a slice, without a topology."""
    host = [device for device in devices if _process_of(device) == _process_of(devices[0])]
    return Slice(len(devices), chip_of(devices[0], len(host)))


def _process_of(device: Device) -> int:
    return getattr(device, "process_index", 0)


def chip_of(device: Device, beside: int = 1) -> Chip:
    """Return what is known of a device by its kind. Ask a GPU for its memory; CPU devices share the machine's.

    Args:
        beside: how many devices the process has.
    """
    if device.platform == "cpu":
        return dataclasses.replace(CPU, hbm_bytes=host_bytes() / beside)
    if tpus := [one.chip for one in TPUS.values() if device.device_kind in (one.kind, one.chip.name)]:
        return tpus[0]
    gpus = (GPUS[name] for name, (pattern, *_) in _GPUS.items() if re.search(pattern, device.device_kind))
    chip = next(gpus, Chip(device.device_kind, 0))
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return dataclasses.replace(chip, hbm_bytes=limit) if limit else chip


_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroups v2, v1


def host_bytes() -> float:
    """Return three quarters of the memory that the system allows this process; 0 if it does not say."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for container in map(pathlib.Path, _CONTAINER_LIMITS):
        if container.exists() and (text := container.read_text().strip()).isdecimal():
            limits.append(int(text))
    return 0.75 * min(limits, default=0)


def use_slice(config: ConfigDict, name: str) -> None:
    """Set the mesh of `config` for a slice, so that a run on other devices is refused. "" sets nothing.

    Raises:
        UserError: no such slice.
    """
    if name:
        devices = find_slice(name).devices
        tensor = tensor_shards(devices, config.to_dict()["train"]["batch_size"])
        sizes = {"mesh.data": 1, "mesh.fsdp": devices // tensor, "mesh.tensor": tensor, "mesh.slice": name}
        config.update_from_flattened_dict(sizes)


def check_slice(name: str, devices: Sequence[Device]) -> None:
    """Refuse devices that are not the slice that a config was made for; "" accepts any.

    Raises:
        UserError: with the slice, the devices, and what to do.
    """
    if not name:
        return
    wanted, there = find_slice(name), found(devices)
    if wanted.chip.name != there.chip.name or there.devices % wanted.devices:
        raise UserError(
            f"{name} is {wanted.devices} x {wanted.chip.name}, and here are {there.devices} x "
            f"{there.chip.name}: start on that slice, or leave {name} out of --config"
        )


def tensor_shards(devices: int, batch_size: int, tensor_axes: Sequence[int] = ()) -> int:
    """Choose over how many devices heads and MLP are split.

    One, as long as each device has two pairs of a batch to fill a row with: splitting over fsdp alone has the least
    exposed traffic for 7B models. (On v5e-64, rows of one pair each are 55% full, and a step of zephyr_7b takes twice
    as long.) Up to eight devices are left to fsdp, with a pair each.
    """
    num_shards = 1
    most = min(batch_size, max(8, batch_size // 2))
    while devices // num_shards > most and math.gcd(devices, *tensor_axes) % (2 * num_shards) == 0:
        num_shards *= 2
    return num_shards
