"""Command line: python -m spin_jax.main --config=FILE[:ARG] [--workdir=DIR] [--config.section.field=value ...]

Runs SPIN: per iteration, sample a response to every prompt from the opponent, train the policy to tell real from
generated, export it as the next opponent. The same command again goes on where the last one ended. Exit status: 0
done, 2 a mistake that the one line printed says how to mend, 75 stopped by a signal with everything saved.

On several hosts the command is started on each, with a workdir that all of them see. The hosts of a TPU slice find each
other; elsewhere --coordinator says where process 0 is.
"""

import os
import pathlib
import sys

from spin_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before what takes longer to import

from absl import flags

from spin_jax import config as config_lib
from spin_jax.errors import UserError
from spin_jax.runtime import cli
from spin_jax.runtime.files import expand

flags.adopt_module_key_flags(cli)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written: a directory or gs://BUCKET/PATH; runs/NAME of the config without it."
)
_STAGES = flags.DEFINE_list(
    "stages",
    list(config_lib.STAGES),
    "Which stages to run, of generate,score,train; the others' results must be there.",
)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "Trace three training steps into ITERATION/profile, for Perfetto and TensorBoard."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    'Several processes: HOST:PORT of process 0, or "auto" under SLURM, Open MPI and GKE, where jax finds it out.',
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is, from 0.")
_CHECK_FOR = flags.DEFINE_integer(
    "check_for", None, "Run nothing: check the command for this many devices, or for any number if it is 0."
)


def main(argv: list[str]) -> int:
    del argv
    cli.require(config="configs/quickstart.py")
    if _WORKDIR.value == "":
        raise UserError("--workdir= is empty: name a directory, or leave the flag out")
    _check_stages(_STAGES.value)
    config = config_lib.freeze(cli.config())
    default = f"runs/{pathlib.PurePath(cli.config_file().partition(':')[0]).stem}"
    workdir = os.fspath(expand(_WORKDIR.value or default))
    _check_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _CHECK_FOR.value is not None:
        _check_mesh(config, _CHECK_FOR.value)
        return 0

    # Only now: what follows imports jax and finds the devices, which a wrong flag should not wait for.
    from spin_jax.runtime import multihost, preemption
    from spin_jax.self_play.algorithm import self_play

    def play() -> None:
        rows = self_play(config, workdir, _STAGES.value, profile=_PROFILE.value)
        if multihost.is_first():
            _tell(rows, workdir)

    multihost.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _WORKDIR.value is None and multihost.are_several():
        raise UserError(f"several hosts need a workdir that all of them see: write --workdir=gs://BUCKET/{default}")
    return preemption.exit_status(play)


def _check_stages(stages: list[str]) -> None:
    if unknown := [stage for stage in stages or [""] if stage not in config_lib.STAGES]:
        raise UserError(f"--stages={unknown[0]} is not one of {', '.join(config_lib.STAGES)}")
    if _PROFILE.value and "train" not in stages:
        raise UserError("--profile traces training steps: add train to --stages")


def _check_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """HOST:PORT comes with a number of processes and which of them this is; nothing else does."""
    given = (num_processes, process_id) != (None, None)
    if coordinator in (None, "auto"):
        if given:
            raise UserError("--num_processes and --process_id need --coordinator=HOST:PORT, the address of process 0")
    elif ":" not in coordinator or num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise UserError(
            f"--coordinator={coordinator}: write --coordinator=HOST:PORT --num_processes=N --process_id=I, with I from "
            "0 to N - 1"
        )


def _check_mesh(config: config_lib.Config, devices: int) -> None:
    """Config and devices go together, as far as can be told without the model."""
    if devices:
        from jax.sharding import AbstractMesh

        from spin_jax import sizing
        from spin_jax.devices import sharding

        mesh = AbstractMesh(tuple(sizing.mesh_sizes(config, devices)), sharding.AXES)
        sharding.check_pairs(mesh, config.train.batch_size, config.train.micro_batches or 1)
        sizes = ", ".join(f"{axis} {num_shards}" for axis, num_shards in mesh.shape.items())
        what = f"checked the flags, and a mesh of {devices} devices ({sizes}); not the memory, which needs the devices"
        print(what, file=sys.stderr)


def _tell(rows: list[dict], workdir: str) -> None:
    """Where the results are."""
    trained = [row["iteration"] for row in rows if row["iteration"] is not None]
    if trained:
        print(f"the last policy: {workdir}/iteration_{trained[-1]}/model; report: {workdir}/report.html")
    else:
        print(f"done: {', '.join(_STAGES.value)}; results are in {workdir}/iteration_0")


def run() -> None:
    """Entry point: a user's mistake is one line on stderr, anything else a traceback."""
    cli.log_plainly()
    cli.run(main)


if __name__ == "__main__":
    run()
