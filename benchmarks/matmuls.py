"""bfloat16 matmuls on a CPU: XLA asked for a result in float32, which is cast, against asked for it in bfloat16.

    python benchmarks/matmuls.py [--tokens=2048] [--json=FILE]

The first is what `project` (spin_jax/models/execution.py) does on one CPU. The matmuls are those of a layer of
SmolLM2-135M. The two run in turn, so that whatever else the machine does meets both.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from contest import busy_seconds, machine  # noqa: E402

from spin_jax.models import Execution  # noqa: E402
from spin_jax.models.projections import project  # noqa: E402

SIZES = {"B": 1, "D": 576, "N": 9, "K": 3, "H": 64, "F": 1536}
EXPRESSIONS = {
    "q": "BTD,DNH->BTNH",
    "k, v": "BTD,DKH->BTKH",
    "o": "BTNH,NHD->BTD",
    "gate, up": "BTD,DF->BTF",
    "down": "BTF,FD->BTD",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=pathlib.Path)
    flags = parser.parse_args()
    report = {"machine": machine(), "tokens": flags.tokens}
    print(report["machine"])
    busy, cpu, start = busy_seconds(), time.process_time(), time.perf_counter()
    report["matmuls"] = {name: compare(name, flags.tokens, flags.rounds) for name in EXPRESSIONS}
    busy, cpu = busy_seconds() - busy, time.process_time() - cpu
    report["others"] = max(0.0, (busy - cpu) / (time.perf_counter() - start))
    print(f"others kept {report['others']:.2f} cores busy")
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")


def compare(name: str, tokens: int, rounds: int) -> dict:
    """GFLOP/s in the median round of each, and the median of the rounds' ratios of their times."""
    expression, bfloat16 = EXPRESSIONS[name], jnp.dtype(jnp.bfloat16)
    sizes = SIZES | {"T": tokens}
    x_axes, w_axes = expression.split("->")[0].split(",")
    x, w = (jnp.ones([sizes[axis] for axis in axes], bfloat16) for axes in (x_axes, w_axes))
    runs = {
        "float32": jax.jit(lambda x, w: project(expression, x, w, (None,) * w.ndim, Execution(bfloat16), bfloat16)),
        "bfloat16": jax.jit(lambda x, w: jnp.einsum(expression, x, w, preferred_element_type=bfloat16)),
    }
    seconds = {kind: [] for kind in runs}
    for turn in range(1 + rounds):
        for kind in list(runs) if turn % 2 else list(runs)[::-1]:
            start = time.perf_counter()
            jax.block_until_ready(runs[kind](x, w))
            seconds[kind].append(time.perf_counter() - start)
    seconds = {kind: taken[1:] for kind, taken in seconds.items()}  # the first one compiles
    flops = 2 * math.prod(sizes[axis] for axis in {*x_axes, *w_axes})
    gflops = {kind: flops / statistics.median(taken) / 1e9 for kind, taken in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["float32"], seconds["bfloat16"], strict=True))
    rates = ", ".join(f"result in {kind} {rate:4.0f} GFLOP/s" for kind, rate in gflops.items())
    print(f"{name:8} {rates}; ratio of times {ratio:.2f}", flush=True)
    return {"gflops": gflops, "ratio": ratio}


if __name__ == "__main__":
    main()
