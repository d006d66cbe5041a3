"""What this machine's CPU and memory can do of what training steps and decode steps are made of.

The ratios of train_step.py and sampling.py depend on it: a row of this beside a row of those.

    python benchmarks/machine.py [--rounds=20] [--json=FILE]
"""

import argparse
import functools
import json
import mmap
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from contest import busy_seconds, machine  # noqa: E402

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
MiB = 2**20
LAYERS, HIDDEN, MLP = 30, 576, 1536  # of SmolLM2-135M: 100 MiB of one kind of weights in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path)
    flags = parser.parse_args()
    found = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    report = {"machine": machine(), "instructions": [name for name in INSTRUCTIONS if name in found]}
    print(report["machine"], *report["instructions"])
    busy, cpu, start = busy_seconds(), time.process_time(), time.perf_counter()
    report["measured"] = {}
    for name, unit, prepare in MEASURES:
        measure = prepare()
        measure()  # compiles
        report["measured"][name] = rates = sorted(measure() for _ in range(flags.rounds))
        print(f"{name:58} {statistics.median(rates):7.1f} ({rates[0]:.1f} to {rates[-1]:.1f}) {unit}", flush=True)
    others = (busy_seconds() - busy - (time.process_time() - cpu)) / (time.perf_counter() - start)
    report["others"] = max(0.0, others)
    print(f"others kept {report['others']:.2f} cores busy")
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")


def seconds(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def reading() -> Callable[[], float]:
    """GB/s of a sum over 400 MB on all cores."""
    x, total = jnp.ones(100_000_000, jnp.float32), jax.jit(jnp.sum)
    return lambda: x.nbytes / seconds(total, x) / 1e9


def touching(huge: bool) -> Callable[[], float]:
    """GB/s of the first write to 256 MiB of fresh memory, which the system maps and fills with zeros."""

    def measure() -> float:
        memory = mmap.mmap(-1, 256 * MiB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # as malloc asks for it
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        numbers = np.frombuffer(memory, np.uint8)
        start = time.perf_counter()
        numbers[:: mmap.PAGESIZE] = 1
        return 256 * MiB / (time.perf_counter() - start) / 1e9

    return measure


def matmul(rows: int, dtype: jnp.dtype) -> Callable[[], float]:
    """GFLOP/s of x [rows, HIDDEN] times each layer's own [HIDDEN, MLP], with results in float32."""

    def chain(x: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
        for w in weights:
            y = jnp.einsum("bd,df->bf", x, w, preferred_element_type=jnp.float32)
            x = (x + 1e-6 * y[:, : x.shape[1]]).astype(x.dtype)
        return x

    weights = tuple(jnp.full((HIDDEN, MLP), 1e-3, dtype) for _ in range(LAYERS))
    x, compiled = jnp.ones((rows, HIDDEN), dtype), jax.jit(chain)
    return lambda: 2 * rows * HIDDEN * MLP * LAYERS / seconds(compiled, x, weights) / 1e9


MEASURES = [
    ("memory read by all cores", "GB/s", reading),
    ("fresh memory in pages of 4 KiB", "GB/s", functools.partial(touching, huge=False)),
    ("fresh memory in pages of 2 MiB", "GB/s", functools.partial(touching, huge=True)),
    *(
        (f"matmul of {rows:,} rows, {dtype.__name__}", "GFLOP/s", functools.partial(matmul, rows, dtype))
        for rows in (32, 2048)
        for dtype in (jnp.float32, jnp.bfloat16)
    ),
]

if __name__ == "__main__":
    main()
