"""Command line: python -m spin_jax.main --config=FILE[:ARG] --workdir=DIR [--config.section.field=value ...]

Runs SPIN: per iteration, sample a response to every prompt from the opponent, train the policy to tell real from
generated, export it as the next opponent. The same command again goes on where the last one ended. Exit status: 0
done, 2 a mistake that the one line printed says how to mend, 75 stopped by a signal with everything saved.
"""

import logging
import os
import signal
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from spin_jax import config as config_lib
from spin_jax.errors import UserError

EXIT_MISTAKE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/, with its argument after a colon where it takes one; --config.a.b=v changes a field.",
    lock_config=True,
)
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
    config_lib.validate(_config())

    # Only now: what follows imports jax and finds the devices, which a wrong flag should not wait for.
    from spin_jax.self_play import self_play
    from spin_jax.train import Stopped

    # A preempted machine gets SIGTERM, which outside training, where it saves first, stops like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        rows = self_play(_config(), _WORKDIR.value, _STAGES.value)
    except (Stopped, KeyboardInterrupt) as stopped:
        print(str(stopped) or "interrupted; start the same command again to go on", file=sys.stderr)
        return EXIT_STOPPED
    trained = [row["iteration"] for row in rows if row["iteration"] is not None]
    if trained:
        print(f"the last policy: {_WORKDIR.value}/iteration_{trained[-1]}/model; curves: {_WORKDIR.value}/plots")
    else:
        print(f"done: {', '.join(_STAGES.value)}; results are in {_WORKDIR.value}/iteration_0")
    return 0


def _config() -> ConfigDict:
    """The config, or one line on why its file could not be read (which ml_collections tells only now)."""
    try:
        _CONFIG.value.to_dict()
    except OSError as error:
        raise UserError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from None
    return _CONFIG.value


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with each error as one line."""
    schema = config_lib.flatten(config_lib.base_config())
    for argument in argv:
        field = argument.partition("=")[0].removeprefix("--").removeprefix("config.")
        if argument.startswith("--config.") and field not in schema:
            raise UserError(f"config.{field} is not a field{config_lib.did_you_mean(field, schema)}")
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # A config file's own error arrives as the text of its traceback.
        text = str(error).strip().splitlines()
        message = text[-1] if "Traceback" in str(error) else " ".join(text)
        raise UserError(message.strip().removeprefix(f"{UserError.__module__}.UserError: ")) from None


def run() -> None:
    """Entry point: a user's mistake is one line on stderr, anything else a traceback."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step of every save at INFO
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("spin_jax").setLevel(logging.INFO)
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # it advises to install torch, which nobody needs here
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        print(f"spin_jax: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


if __name__ == "__main__":
    run()
