"""Compiles every shipped 7B config for every TPU slice and writes the table of docs/compile_check.md.

    python benchmarks/compile_table.py [CONFIG:SLICE ...]

Without arguments: all of them, one to two hours on two cores the first time; what was compiled is remembered. With
arguments: those are compiled and printed, and nothing is written. Needs libtpu (pip install 'jax[tpu]'), and no TPU.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin_jax.slices import SLICES, GiB  # noqa: E402

DOCUMENT = ROOT / "docs/compile_check.md"
BEGIN, END = "<!-- made by benchmarks/compile_table.py -->", "<!-- end of what it made -->"
CONFIGS = ("zephyr_7b", "llama2_7b")
COLUMNS = (
    "config",
    "slice",
    "program",
    "GiB a chip",
    "fits",
    "TFLOP a chip",
    "estimated s",
    "MFU",
    "GiB sent, SYNC",
    "async",
)


def main(chosen: list[str]) -> None:
    everything = [":".join(pair) for pair in itertools.product(CONFIGS, (n for n, s in SLICES.items() if s.topology))]
    rows = [row for name in chosen or everything for row in check(name)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows])
    print(table)
    if not chosen:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}")


def check(name: str) -> list[list[str]]:
    """The rows of a CONFIG:SLICE."""
    print(name, file=sys.stderr, flush=True)
    config, _, slice_name = name.partition(":")
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "report.json"
        command = [
            sys.executable,
            "-m",
            "spin_jax.compile_check",
            f"--config=configs/{config}.py:{slice_name}",
            f"--json={file}",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not file.exists():
            return [[config, slice_name, done.stderr.strip().splitlines()[-1], *[""] * (len(COLUMNS) - 3)]]
        report = json.loads(file.read_text())
    return [[config, slice_name, *cells(program)] for program in report["programs"]]


def cells(program: dict) -> list[str]:
    size = f"{program['total_bytes'] / GiB:.1f} of {program['limit'] / GiB:.1f}"
    fits, work = "yes" if program["fits"] else "**no**", program["work"]
    if work is None:
        return [program["program"], size, fits, "", "", "", "", ""]
    sent = {
        is_async: sum(t["wire_bytes"] for t in work["traffic"] if t["is_async"] == is_async)
        for is_async in (False, True)
    }
    mfu = f"{program['mfu']:.0%}" if program["mfu"] else ""
    flops = f"{(work['flops'] + work['kernel_flops']) / 1e12:.1f}"
    return [
        program["program"],
        size,
        fits,
        flops,
        f"{program['seconds']:.3g}",
        mfu,
        *(f"{sent[a] / GiB:.2f}" for a in (False, True)),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
