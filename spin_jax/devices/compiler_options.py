"""What is chosen per platform: the precision of matmuls, and what XLA is told beside the program, each with its reason.

They go with each program (`jax.jit(..., compiler_options=...)`), not into the environment: a run, a notebook and the
compile check then compile the same thing.
"""

import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spin_jax.devices.accelerators import Device

# Every TPU.
_TPU: dict[str, bool | int] = {
    # Else the partitioner makes a matmul with sharded weights a loop over pieces ("windowed einsum"): smaller matmuls,
    # sums in bfloat16, thousands of permutes a step.
    "xla_tpu_enable_windowed_einsum_for_all_gather": False,
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
}

# Where there are SparseCores, they move data while the matrix units work; left alone, every exchange stops the program.
_SPARSE_CORE: dict[str, bool | int] = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
}

# Vector memory of one fusion, in KiB: of 128 MiB, and with the default of 16 MiB the tiles of a 7B model's matmuls are
# so small that they wait for memory. Twice as much gains a little more on v6e; on v5e it compiles for many minutes.
_LARGER_TILES: dict[str, bool | int] = {"xla_tpu_scoped_vmem_limit_kib": 32768}

# By jax.Device.device_kind. "TPU v4" has neither SparseCores for this nor, says libtpu, a safe way to hide exchanges.
_TPU_GENERATIONS: dict[str, dict[str, bool | int]] = {
    "TPU v5 lite": _LARGER_TILES
    | {
        # Weights are gathered behind matmuls by default. The sums of gradients need to be asked, and so does hiding
        # either behind anything that is no matmul: the first weight of a layer has only its norm to hide behind.
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True,
        "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
    },
    "TPU v5": _LARGER_TILES | _SPARSE_CORE,  # v5p
    "TPU v6 lite": {"xla_tpu_scoped_vmem_limit_kib": 65536} | _SPARSE_CORE,
}


# Instructions that multiply bfloat16 and add up float32, by their names in /proc/cpuinfo.
_CPU_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


def compute_dtype(asked: str, device: Device) -> jnp.dtype:
    """The dtype of matmuls' operands; sums are float32. `asked` of "auto" is bfloat16, which loses nothing to speak of,
    where the device has instructions for it, and float32 elsewhere.

    GPUs have them from compute capability 8.0 on: a T4 has not, and float16 would need its loss scaled.
    """
    if asked != "auto":
        return jnp.dtype(asked)
    if device.platform == "gpu":
        return jnp.dtype(jnp.bfloat16 if gpu_capability(device) >= (8, 0) else jnp.float32)
    if device.platform != "cpu":
        return jnp.dtype(jnp.bfloat16)
    found = pathlib.Path("/proc/cpuinfo")
    flags = set(found.read_text().split()) if found.exists() else set()
    return jnp.dtype(jnp.bfloat16 if flags & _CPU_BFLOAT16 else jnp.float32)


def gpu_capability(device: Device) -> tuple[int, ...]:
    """An NVIDIA GPU's compute capability, such as (7, 5) for a T4; (0,) of another maker's."""
    found = str(getattr(device, "compute_capability", ""))
    return tuple(map(int, found.split("."))) if re.fullmatch(r"\d+\.\d+", found) else (0,)


def xla_options(mesh: Mesh | None) -> dict[str, bool | int] | None:
    """The compiler options for programs on a mesh's devices; None where the defaults serve."""
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    if device.platform != "tpu":
        return None
    return _TPU | _TPU_GENERATIONS.get(device.device_kind, {})


def jit(mesh: Mesh, function: Callable, **options) -> Callable:
    """`jax.jit` with the compiler options for a mesh's devices."""
    return jax.jit(function, compiler_options=xla_options(mesh), **options)
