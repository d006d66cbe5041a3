"""Command line: python -m spin_jax.main --config=FILE[:ARG] --workdir=DIR [--config.section.field=value ...]

Runs SPIN: per iteration, sample a response to every prompt from the opponent, train the policy to tell real from
generated, export it as the next opponent. The same command again goes on where the last one ended. Exit status: 0
done, 2 a mistake that the one line printed says how to mend, 75 stopped by a signal with everything saved.
"""

import logging
import os
import signal
import sys

from absl import flags
from absl import logging as absl_logging

from spin_jax import command
from spin_jax import config as config_lib
from spin_jax.errors import UserError

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again

_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written: a directory or gs://BUCKET/PATH.")
_STAGES = flags.DEFINE_list(
    "stages",
    list(config_lib.STAGES),
    "Which stages to run, of generate,score,train; the others' results must be there.",
)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag: fields are changed as --config.section.field=value")
    for flag in ("config", "workdir"):
        if not flags.FLAGS[flag].present:
            raise UserError(
                f"--{flag} is missing: python -m spin_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"
            )
    if unknown := [stage for stage in _STAGES.value if stage not in config_lib.STAGES]:
        raise UserError(f"--stages={unknown[0]} is not one of {', '.join(config_lib.STAGES)}")
    config_lib.validate(command.config())

    # Only now: what follows imports jax and finds the devices, which a wrong flag should not wait for.
    from spin_jax.self_play import self_play
    from spin_jax.train import Stopped

    # A preempted machine gets SIGTERM, which outside training, where it saves first, stops like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        rows = self_play(command.config(), _WORKDIR.value, _STAGES.value)
    except (Stopped, KeyboardInterrupt) as stopped:
        print(str(stopped) or "interrupted; start the same command again to go on", file=sys.stderr)
        return EXIT_STOPPED
    trained = [row["iteration"] for row in rows if row["iteration"] is not None]
    if trained:
        print(f"the last policy: {_WORKDIR.value}/iteration_{trained[-1]}/model; curves: {_WORKDIR.value}/plots")
    else:
        print(f"done: {', '.join(_STAGES.value)}; results are in {_WORKDIR.value}/iteration_0")
    return 0


def run() -> None:
    """Entry point: a user's mistake is one line on stderr, anything else a traceback."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step of every save at INFO
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("spin_jax").setLevel(logging.INFO)
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # it advises to install torch, which nobody needs here
    command.run(main)


if __name__ == "__main__":
    run()
