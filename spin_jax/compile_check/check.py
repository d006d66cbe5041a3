"""The programs of a config compiled for a slice, and what is printed of them."""

import dataclasses
import math
from collections.abc import Sequence

from spin_jax.config import Config
from spin_jax.devices.accelerators import GiB, Slice, find_slice, smallest
from spin_jax.errors import UserError


def check(
    config: Config,
    target: Slice,
    lengths: Sequence[tuple[int, int, int]] | None = None,
    layers: int = 0,
    names: Sequence[str] = (),
    cache: bool = True,
) -> list:
    """A `compiler.Report` of each program of a config, or of those named, in the order in which a run needs them.

    Args:
        lengths: (prompt, real, generated) tokens of each pair of a batch; None: the longest that the config allows.
        layers: of a shallower model; 0 is all.

    Raises:
        UserError: no such program, no compiler for the slice, or the config and the slice do not go together.
    """
    # Only now: this imports jax, and `main` has said on which platform.
    from spin_jax.compile_check import compiler, programs

    devices = compiler.devices_of(target)
    model = describe_model(config)
    if layers:
        model = dataclasses.replace(model, num_layers=layers)
    made = programs.make_programs(config, model, devices, lengths)
    if unknown := set(names) - {program.name for program in made}:
        raise UserError(f"--programs: {unknown.pop()!r} is not one of {', '.join(program.name for program in made)}")
    chosen = [program for program in made if not names or program.name in names]
    return [compiler.report(program, target, compiler.CACHE if cache else None) for program in chosen]


def describe_model(config: Config):
    """The description of the config's model."""
    from spin_jax.compile_check import known_models
    from spin_jax.tasks import toy

    if config.model.path == "toy:":
        return toy.model_config(config.toy)
    return known_models.describe(config.model.path, config.model.revision or None)


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
    from spin_jax.compile_check.estimate import ASSUMPTIONS

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


def advice(config: Config, name: str, report) -> str:
    """What would make a program fit, as far as bytes a chip tell: fields to change, slices to take."""
    from spin_jax.devices.sharding import mesh_sizes

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
