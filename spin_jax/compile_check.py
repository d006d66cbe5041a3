"""Does a config fit a slice, and what does it do there? Without the slice.

    python -m spin_jax.compile_check --config=configs/zephyr_7b.py:v5e-16 [--json=FILE]

Compiles every program of a run for the slice that the config's argument names, and prints for each the bytes a chip
needs, an estimate of its time with the assumptions it rests on, and its traffic between chips. TPUs are compiled for by
libtpu (pip install 'jax[tpu]'), which needs no TPU. Exit status: 0 all programs fit, 1 one does not, 2 a mistake that
the one line printed says how to mend. How to read the table: docs/compile_check.md.
"""

from spin_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before what takes longer to import

import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from spin_jax import command
from spin_jax import config as config_lib
from spin_jax.errors import UserError
from spin_jax.slices import GiB, Slice, find_slice, is_slice, smallest

EXIT_TOO_LARGE = 1

flags.adopt_module_key_flags(command)
_SLICE = flags.DEFINE_string("slice", None, "The slice, for a config file that takes none as its argument.")
_JSON = flags.DEFINE_string("json", None, "Also write the report to this file, as JSON.")
_CACHE = flags.DEFINE_bool("cache", True, "Remember what the compiler said of a program, in ~/.cache/spin_jax.")
_LAYERS = flags.DEFINE_integer(
    "layers", 0, "Check a model of this many layers instead of its own number.", lower_bound=0
)
_LENGTHS = flags.DEFINE_list(
    "lengths", [], "PROMPT,REAL,GENERATED: tokens of all pairs of a batch, instead of the longest that there can be."
)
_PROGRAMS = flags.DEFINE_list("programs", [], "Check these alone; all without it.")


def main(argv: list[str]) -> int:
    del argv
    config, name = config_and_slice()
    lengths = [_pair_lengths(_LENGTHS.value)] * config.train.batch_size if _LENGTHS.value else None
    if _JSON.value and not pathlib.Path(_JSON.value).parent.is_dir():
        raise UserError(f"--json={_JSON.value} cannot be written: make its directory, or name another")
    if find_slice(name).topology:
        # The programs are for a TPU that is described; this process must not take one that may be here.
        os.environ["JAX_PLATFORMS"] = "cpu"

    from spin_jax import stopping  # only now: it imports jax

    return stopping.exit_status(lambda: _check_and_tell(config, name, lengths))


def config_and_slice() -> tuple[ConfigDict, str]:
    """The config of the flags, as a run has it, and the slice: that of --slice, or of the config's argument.

    Raises:
        UserError: a flag is missing, or config and slice are wrong.
    """
    command.require(config="configs/zephyr_7b.py:v5e-16")
    config = command.config()
    named = next(filter(is_slice, command.config_file().partition(":")[2].split(",")), "")
    if not named:
        command.require(slice="v5e-16")
    if _SLICE.value and named and named != _SLICE.value:
        raise UserError(f"--slice={_SLICE.value} is not the slice of --config={command.config_file()}: leave it out")
    name = named or _SLICE.value
    find_slice(name)
    config.data.train = config.data.train or "not read here"
    config_lib.validate(config)
    return config, name


def _check_and_tell(config: ConfigDict, name: str, lengths: Sequence[tuple[int, int, int]] | None) -> int:
    from spin_jax import aot, auto

    target = find_slice(name)
    model, devices, given = _model(config), aot.devices_of(target), config
    config = auto.choose(given, model, devices)
    reports = check(config, target, lengths, _LAYERS.value, _PROGRAMS.value, _CACHE.value)
    heading = f"{command.config_file()}: {target.devices} x {target.chip.name}, compiled by {aot.versions()}"
    heading += f"\n{auto.what(given, config)}"
    print("\n\n".join([heading, memory_table(reports), *(describe(report) for report in reports)]))
    if _JSON.value:
        content = {"config": command.config_file(), "slice": name, "compiler": aot.versions()}
        content |= {
            "chosen": auto.what(given, config),
            "estimate": auto.training_bytes(config, model, auto.target(config, model, devices)),
        }
        content |= {"chip": dataclasses.asdict(target.chip), "programs": [report.as_json() for report in reports]}
        pathlib.Path(_JSON.value).write_text(json.dumps(content, indent=1) + "\n")
    too_large = [report for report in reports if not report.fits]
    for report in too_large:
        print(f"\n{report.program} does not fit {name}. {advice(config, name, report)}", file=sys.stderr)
    return EXIT_TOO_LARGE if too_large else 0


def _pair_lengths(given: Sequence[str]) -> tuple[int, int, int]:
    if len(given) != 3 or not all(number.isdecimal() and int(number) for number in given):
        raise UserError(f"--lengths={','.join(given)}: write PROMPT,REAL,GENERATED, for example --lengths=512,512,256")
    prompt, real, generated = map(int, given)
    return prompt, real, generated


def check(
    config: ConfigDict,
    target: Slice,
    lengths: Sequence[tuple[int, int, int]] | None = None,
    layers: int = 0,
    names: Sequence[str] = (),
    cache: bool = True,
) -> list:
    """A `spin_jax.aot.Report` of each program of a config, or of those named, in the order in which a run needs them.

    Args:
        lengths: (prompt, real, generated) tokens of each pair of a batch; None: the longest that the config allows.
        layers: of a shallower model; 0 is all.

    Raises:
        UserError: no such program, no compiler for the slice, or the config and the slice do not go together.
    """
    # Only now: this imports jax, and `main` has said on which platform.
    from spin_jax import aot, compile_programs

    devices = aot.devices_of(target)
    model = _model(config)
    if layers:
        model = dataclasses.replace(model, num_layers=layers)
    made = compile_programs.make_programs(config, model, devices, lengths)
    if unknown := set(names) - {program.name for program in made}:
        raise UserError(f"--programs: {unknown.pop()!r} is not one of {', '.join(program.name for program in made)}")
    chosen = [program for program in made if not names or program.name in names]
    return [aot.report(program, target, aot.CACHE if cache else None) for program in chosen]


def _model(config: ConfigDict):
    """The description of the config's model."""
    from spin_jax import models, toy

    if config.model.path == "toy:":
        return toy.model_config(config.toy)
    return models.describe(config.model.path, config.model.revision or None)


# What is printed


def memory_table(reports: Sequence) -> str:
    """GiB a chip: a row for each kind, a column for each program."""
    kinds = list(dict.fromkeys(kind for report in reports for kind in report.bytes))
    rows = [["GiB a chip", *(report.program for report in reports)]]
    rows += [[kind, *(_gib(report.bytes.get(kind)) for report in reports)] for kind in kinds]
    rows += [["in all", *(_gib(report.total_bytes) for report in reports)]]
    if reports[0].limit:
        verdicts = ["fits" if report.fits else "DOES NOT FIT" for report in reports]
        rows += [[f"of {_gib(reports[0].limit)}", *verdicts]]
    return _aligned(rows)


def describe(report) -> str:
    """Time, FLOPs, loops and traffic of one program, with the assumptions of the estimate."""
    from spin_jax.compile_report import ASSUMPTIONS

    work = report.work
    if work is None:
        return f"{report.program}: {_gib(report.total_bytes)} GiB a chip; the rest needs a TPU's compiler, and a fit"
    lines = [f"{report.program}: about {report.seconds:.4g} s" + (f", MFU {report.mfu:.0%}" if report.mfu else "")]
    lines += [f"  {seconds:9.4f} s  {ASSUMPTIONS[part]}" for part, seconds in work.seconds.items()]
    lines += [
        f"  {work.roofline_seconds:9.4f} s  would be enough at the speed of matmul units and HBM, without traffic"
    ]
    visited = f" ({report.kernel_share:.0%} of the tiles of causal rows)"
    kernels = f" and {work.kernel_flops / 1e12:.4g} in Pallas kernels{visited}" if work.kernel_flops else ""
    asked = f", of which the model asks for {report.model_flops / 1e12:.4g}" if report.model_flops else ""
    lines += [f"  TFLOP a chip: {work.flops / 1e12:.4g} in matmuls{kernels}{asked}"]
    for loop in work.loops:
        trips = f"{loop.trips} trips" if loop.trips is not None else "UNKNOWN trips, counted once"
        entered = f"{loop.times} x " if loop.times > 1 else ""
        per_trip = f"{_gib(loop.hbm_bytes)} GiB and {loop.seconds * 1e3:.3g} ms each"
        lines += [f"  loop of {entered}{trips}: {per_trip} ({loop.name})"]
    rows = [["  exchange", "axes", "dtype", "", "times", "GiB", "GiB sent a chip"]]
    for one in work.traffic:
        how = "async" if one.is_async else "SYNC"
        rows += [[f"  {one.kind}", one.axes, one.dtype, how, f"{one.times}", _gib(one.bytes), _gib(one.wire_bytes)]]
    return "\n".join(lines + ([_aligned(rows, left=4)] if work.traffic else []))


def advice(config: ConfigDict, name: str, report) -> str:
    """What would make a program fit, as far as bytes a chip tell: fields to change, slices to take."""
    from spin_jax.sharding import mesh_sizes

    train, generate, target = config.train, config.generate, find_slice(name)
    data, fsdp, tensor = mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, target.devices)
    activations = report.bytes.get("activations", 0.0)
    room = report.limit - (report.total_bytes - activations)
    parts = 2 ** math.ceil(math.log2(activations / room)) if activations and room > 0 else 0
    tries = []
    if "optimizer" in report.bytes:
        if config.spin.opponent == "live":
            tries.append("--config.spin.opponent=stored")
        if config.model.remat != "full":
            tries.append("--config.model.remat=full")
        micro_batches = train.micro_batches * parts
        if parts and micro_batches * data * fsdp <= train.batch_size:  # a pair for each device
            tries.append(f"--config.train.micro_batches={micro_batches}")
        if not config.lora.rank:
            tries.append("--config.lora.rank=64")
    elif parts and generate.batch_size >= parts:
        tries.append(f"--config.generate.batch_size={generate.batch_size // parts}")
    if larger := smallest(report.total_bytes * target.devices):
        tries.append(f"a slice with more memory ({', '.join(larger)})")
    if fsdp % 2 == 0:
        tries.append(f"--config.mesh.fsdp={fsdp // 2} with --config.mesh.tensor={2 * tensor}")
    return f"Try {', or '.join(tries)}."


def _gib(size: float | None) -> str:
    if not size:
        return "-"
    return f"{size / GiB:.2f}" if size >= 0.005 * GiB else "<0.01"


def _aligned(rows: list[list[str]], left: int = 1) -> str:
    """Columns of one width: the first `left` start together, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


if __name__ == "__main__":
    command.run(main)
