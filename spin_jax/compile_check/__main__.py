"""Does a config fit a slice, and what does it do there? Without the slice.

    python -m spin_jax.compile_check --config=configs/zephyr_7b.py:v5e-16 [--json=FILE]

Compiles every program of a run for the slice that the config's argument names, and prints for each the bytes a chip
needs, an estimate of its time with the assumptions it rests on, and its traffic between chips. TPUs are compiled for by
libtpu (pip install 'jax[tpu]'), which needs no TPU. Exit status: 0 all programs fit, 1 one does not, 2 a mistake that
the one line printed says how to mend. How to read the table: docs/compile_check.md.
"""

from spin_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before what takes longer to import

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from spin_jax import config as config_lib
from spin_jax.compile_check.check import advice, check, describe, describe_model, memory_table
from spin_jax.devices.accelerators import find_slice, is_slice
from spin_jax.errors import UserError
from spin_jax.runtime import cli

EXIT_TOO_LARGE = 1

flags.adopt_module_key_flags(cli)
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

    from spin_jax.runtime import preemption  # only now: it imports jax

    return preemption.exit_status(lambda: _check_and_tell(config, name, lengths))


def config_and_slice() -> tuple[config_lib.Config, str]:
    """The config of the flags, as a run has it, and the slice: that of --slice, or of the config's argument.

    Raises:
        UserError: a flag is missing, or config and slice are wrong.
    """
    cli.require(config="configs/zephyr_7b.py:v5e-16")
    config = cli.config()
    named = next(filter(is_slice, cli.config_file().partition(":")[2].split(",")), "")
    if not named:
        cli.require(slice="v5e-16")
    if _SLICE.value and named and named != _SLICE.value:
        raise UserError(f"--slice={_SLICE.value} is not the slice of --config={cli.config_file()}: leave it out")
    name = named or _SLICE.value or ""
    find_slice(name)
    config_lib.override(config, {"data.train": config_lib.flatten(config)["data.train"] or "not read here"})
    return config_lib.freeze(config), name


def _check_and_tell(config: config_lib.Config, name: str, lengths: Sequence[tuple[int, int, int]] | None) -> int:
    from spin_jax import sizing
    from spin_jax.compile_check import compiler

    target = find_slice(name)
    model, devices, given = describe_model(config), compiler.devices_of(target), config
    config = sizing.choose(given, model, devices)
    reports = check(config, target, lengths, _LAYERS.value, _PROGRAMS.value, _CACHE.value)
    heading = f"{cli.config_file()}: {target.devices} x {target.chip.name}, compiled by {compiler.versions()}"
    heading += f"\n{sizing.what(given, config)}"
    print("\n\n".join([heading, memory_table(reports), *(describe(report) for report in reports)]))
    if _JSON.value:
        content = {"config": cli.config_file(), "slice": name, "compiler": compiler.versions()}
        content |= {
            "chosen": sizing.what(given, config),
            "estimate": sizing.training_bytes(config, model, sizing.target(config, model, devices)),
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


if __name__ == "__main__":
    cli.run(main)
