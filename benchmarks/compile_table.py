"""Compiles every shipped 7B config for every TPU slice and writes the table of docs/compile_check.md.

    python benchmarks/compile_table.py [--programs=NAME,...] [CONFIG:SLICE ...]

Without arguments: all of them, one to two hours on two cores the first time; what was compiled is remembered. Only the
rows of `--programs`, if they are given, are made anew. With configs and slices: those are compiled and printed, and
nothing is written. Needs libtpu (pip install 'jax[tpu]'), and no TPU.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin_jax.slices import GiB  # noqa: E402

DOCUMENT = ROOT / "docs/compile_check.md"
BEGIN, END = "<!-- made by benchmarks/compile_table.py -->", "<!-- end of what it made -->"
CONFIGS = ("zephyr_7b", "llama2_7b")
SLICES = "v4-32 v5e-8 v5e-16 v5e-64 v5e-256 v5p-8 v5p-32 v6e-16".split()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", nargs="*", metavar="CONFIG:SLICE")
    parser.add_argument("--programs", help="as of compile_check")
    arguments = parser.parse_args()
    everything = [":".join(pair) for pair in itertools.product(CONFIGS, SLICES)]
    rows = [row for name in arguments.chosen or everything for row in check(name, arguments.programs)]
    print(as_table(rows))
    if not arguments.chosen:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        table, after = rest.split(END)
        if arguments.programs:
            rows = merged(table, rows)
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{as_table(rows)}\n\n{END}{after}")


def as_table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows])


def merged(table: str, rows: list[list[str]]) -> list[list[str]]:
    """A table's rows, those of the same config, slice and program replaced; new ones stand in front of a slice's."""
    old = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n") if line.startswith("| ")]
    new = {tuple(row[:3]) for row in rows}
    kept = rows + [row for row in old[2:] if tuple(row[:3]) not in new]
    slices = list(dict.fromkeys(tuple(row[:2]) for row in old[2:]))
    return sorted(kept, key=lambda row: slices.index(tuple(row[:2])))


def check(name: str, programs: str | None) -> list[list[str]]:
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
            *([f"--programs={programs}"] if programs else []),
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
    main()
