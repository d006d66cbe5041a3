"""Prints the estimate of memory a device, sampling and training, of a config on devices that need not be here.

    python benchmarks/memory.py CONFIG DEVICES [DEVICES ...] [section.field=value ...]
    python benchmarks/memory.py zephyr_7b rtx4090-1 h100-1 v5e-4 lora.rank=16

DEVICES are slices as spin_jax/devices/accelerators.py names them. What the config leaves to the devices is chosen
first. TPUs need their compiler's description of a slice: pip install 'jax[tpu]'.
"""

import ast
import pathlib
import runpy
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin_jax import sizing  # noqa: E402
from spin_jax.compile_check import compiler  # noqa: E402
from spin_jax.compile_check.known_models import known  # noqa: E402
from spin_jax.config import freeze, override  # noqa: E402
from spin_jax.devices.accelerators import Device, GiB, find_slice  # noqa: E402

# By the names that their drivers give them.
KINDS = {"rtx4090": "NVIDIA GeForce RTX 4090", "h100": "NVIDIA H100 80GB HBM3"}


def main(config: str, *words: str) -> None:
    given = runpy.run_path(str(ROOT / "configs" / f"{config}.py"))["get_config"]()
    changes = dict(word.split("=", 1) for word in words if "=" in word)
    override(given, {"data.train": "not read"} | {name: ast.literal_eval(text) for name, text in changes.items()})
    model = known(given.model.path)
    print("| devices | there is | sampling | training step |\n|---|---|---|---|")
    for name in (word for word in words if "=" not in word):
        devices = described(name)
        chosen = sizing.choose(freeze(given), model, devices)
        on = sizing.target(chosen, model, devices)
        stages = map(shown, sizing.stage_bytes(chosen, model, on).values())
        print(f"| {' | '.join([name, f'{on.slice.chip.hbm_bytes / GiB:.1f}', *stages])} |")


def described(name: str) -> list[Device]:
    """The devices of a slice, with what the choice of sizes asks of them."""
    target = find_slice(name)
    if target.topology:
        return compiler.devices_of(target)
    kind = KINDS[name.rpartition("-")[0]]
    one = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability="8.9", memory_stats=dict)
    return [one] * target.devices


def shown(kinds: dict[str, float]) -> str:
    """GiB by kind, and their sum."""
    parts = " + ".join(f"{size / GiB:.1f} {kind}" for kind, size in kinds.items() if size >= 0.05 * GiB)
    return f"{parts} = {sum(kinds.values()) / GiB:.1f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
