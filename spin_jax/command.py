"""What the commands share: the --config flag, errors of one line, exit statuses."""

import logging
import os
import sys
import warnings
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from spin_jax import config as config_lib
from spin_jax.errors import UserError

EXIT_MISTAKE = 2

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/, with its argument after a colon where it takes one; --config.a.b=v changes a field.",
    lock_config=True,
)


def config() -> ConfigDict:
    """The config as the flags changed it.

    Raises:
        UserError: its file could not be read, which ml_collections tells only now.
    """
    try:
        _CONFIG.value.to_dict()
    except OSError as error:
        raise UserError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from None
    return _CONFIG.value


def config_file() -> str:
    """The config's file and argument as they were given, such as "configs/zephyr_7b.py:v5e-16"."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def log_plainly() -> None:
    """What `spin_jax` has to tell goes to stderr as it is; of other packages, warnings alone."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step of every save at INFO
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("spin_jax").setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"  # without the line of code that warns
    # It advises to install torch, which nobody needs here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags and runs `main`: a user's mistake is one line on stderr, anything else a traceback."""
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        print(f"spin_jax: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


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
