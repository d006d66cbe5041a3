"""Compiles the training step of shipped configs for TPU slices with the sizes that are chosen, and prints a table.

    python benchmarks/compile_table.py [--only=TEXT] [--json=FILE]

All of it takes an hour on two cores the first time; what was compiled is remembered. With --only: the rows whose words
hold the text. Needs libtpu (pip install 'jax[tpu]'), and no TPU. Of a T4 the estimate alone is printed.
"""

import argparse
import json
import pathlib
import runpy
import subprocess
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin_jax import sizing  # noqa: E402
from spin_jax.compile_check.known_models import known  # noqa: E402
from spin_jax.config import freeze, override  # noqa: E402
from spin_jax.devices.accelerators import GiB, chip_of  # noqa: E402

LORA = "--config.lora.rank=16"
ROWS = [
    ("zephyr_7b", "v4-8", LORA),
    *[("zephyr_7b", name, "") for name in "v4-16 v5e-8 v5e-16 v5e-32 v5p-16 v6e-8 tpu7x-8".split()],
    *[("tinyllama_1b", name, "") for name in ("v5e-4", "v6e-1")],
    *[("smollm2_135m", name, flags) for name in "t4-1 v5e-1 v6e-1 v3-8 v5e-8".split() for flags in ("", LORA)],
]  # (config, slice, flags)
T4 = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5", memory_stats=dict)
PROGRAMS = "train step"
COLUMNS = ("config", "slice", "chosen", "program", "GiB a chip", "estimated", "fits", "estimated s", "MFU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a text that the words of a row hold")
    parser.add_argument("--json", type=pathlib.Path, help="also write all that the compile check says")
    arguments = parser.parse_args()
    reports = []
    print(as_table([COLUMNS, ["---"] * len(COLUMNS)]))
    for row in ROWS:
        if arguments.only in " ".join(row):
            reports.append(check(*row))
            print(as_table(cells(*row, reports[-1])), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n")


def check(config: str, slice_name: str, flags: str) -> dict:
    """What the compile check says; of GPUs, for which nothing is compiled here, what the estimate says."""
    if slice_name == "t4-1":
        return arithmetic(config, flags)
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "report.json"
        command = [sys.executable, "-m", "spin_jax.compile_check", f"--config=configs/{config}.py", f"--json={file}"]
        command += [f"--slice={slice_name}", f"--programs={PROGRAMS}", *flags.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not file.exists():
            raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
        return json.loads(file.read_text())


def arithmetic(config: str, flags: str) -> dict:
    """Of a T4, in the form of the compile check's report."""
    given = runpy.run_path(str(ROOT / "configs" / f"{config}.py"))["get_config"]()
    override(given, {"data.train": "not read"} | ({"lora.rank": 16} if flags else {}))
    given = freeze(given)
    model = known(given.model.path)
    chosen = sizing.choose(given, model, [T4])
    estimate, limit = sizing.training_bytes(chosen, model, sizing.target(chosen, model, [T4])), chip_of(T4).hbm_bytes
    total = sum(estimate.values())
    program = {"program": "train step", "total_bytes": total, "limit": limit, "fits": total <= limit, "work": None}
    return {"chosen": sizing.what(given, chosen), "estimate": estimate, "programs": [program]}


def cells(config: str, slice_name: str, flags: str, report: dict) -> list[list[str]]:
    """A row of the table for each program."""
    name = f"{config} {flags}".strip()
    chosen = " ".join(word.removeprefix("--config.") for word in report["chosen"].split() if "prefill" not in word)
    rows = []
    for program in sorted(report["programs"], key=lambda program: program["program"], reverse=True):
        trains = program["program"] == "train step"
        size = f"{program['total_bytes'] / GiB:.1f} of {program['limit'] / GiB:.1f}"
        estimate = f"{sum(report['estimate'].values()) / GiB:.1f}" if trains else ""
        seconds, mfu = (f"{program['seconds']:.3g}", f"{program['mfu']:.0%}") if program["work"] else ("", "")
        fits = "yes" if program["fits"] else "**no**"
        rows.append([name, slice_name, chosen, program["program"], size, estimate, fits, seconds, mfu])
    return rows


def as_table(rows: list) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
