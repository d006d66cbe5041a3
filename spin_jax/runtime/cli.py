"""What the commands share: flags, the config that flags change, errors of one line, exit statuses."""

import ast
import difflib
import functools
import inspect
import logging
import os
import pathlib
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from spin_jax import config as config_lib
from spin_jax.config import FIELDS
from spin_jax.config.fields import check_names, did_you_mean
from spin_jax.devices.accelerators import GPU_MEMORY_SHARE, is_slice
from spin_jax.errors import UserError, as_flag, quoted

EXIT_MISTAKE = 2

_CONFIG = flags.DEFINE_string("config", None, "A file of configs/, with its argument after a colon where it takes one.")
_CHANGES = flags.DEFINE_multi_string(
    "config.section.field",
    [],
    "Changes a field, as --config.train.batch_size=8; of one, the last counts. `python -m spin_jax.config` lists all.",
)


# ---- the command line


def run(main: Callable[[list[str]], int | None], words: bool = False) -> None:
    """Parses the flags and runs `main`: a user's mistake is one line on stderr, anything else a traceback. With `words`
    the command takes arguments that are no flags."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
    try:
        app.run(main, flags_parser=functools.partial(parse_flags, words=words))
    except UserError as error:
        print("spin_jax:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


def log_plainly() -> None:
    """Log to stderr: all that `spin_jax` tells, and warnings of other packages. Where stderr is no terminal, put the
    time before each line, and switch off the bars of other packages, which redraw themselves."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step of every save at INFO
    form = "%(message)s"
    if not sys.stderr.isatty():
        form = "%(asctime)s %(message)s"
        for switch in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(switch, "1")
    absl_logging.get_absl_handler().setFormatter(logging.Formatter(form, "%Y-%m-%d %H:%M:%S"))
    logging.getLogger("spin_jax").setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"  # without the line of code that warns


def parse_flags(argv: list[str], words: bool = False) -> list[str]:
    """Parse flags as absl does, but refuse an argument that is no flag, unless the command takes such `words`, and give
    each error as one line."""
    if {"--help", "-help", "-h", "-?"} & set(argv):
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    try:
        given = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
        rest = flags.FLAGS([argv[0], *_gathered(given)])
    except flags.UnrecognizedFlagError as error:
        known = [*flags.FLAGS, *(f"config.{field}" for field in FIELDS)]
        advice = did_you_mean(error.flagname, known, "--")
        raise UserError(f"--{error.flagname} is not a flag{advice}") from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if rest[1:] and not words:
        raise UserError(
            f"{rest[1]!r} is not a flag: flags begin with -- and have no spaces, as --workdir=DIR and "
            "--config.train.batch_size=8"
        )
    return rest


def _gathered(words: Sequence[str]) -> Iterator[str]:
    """Rewrite each flag that changes a field as a value of --config.section.field. Accepted are --config.seed=1 and
    --config.seed 1, --config.sft.control and --noconfig.sft.control."""
    rest = iter(words)
    for word in rest:
        change = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", word, re.DOTALL)
        if not change:
            yield word
            continue
        off, field, value = change.groups()
        default = _default(field)
        if isinstance(default, bool) and value is None:
            value = str(not off)
        elif off:
            raise UserError(f"{word} switches nothing off: write {as_flag(field, default)}, or another value")
        value = next(rest, None) if value is None else value
        if value is None or value.startswith("--"):
            raise UserError(f"--config.{field} has no value: write one, as {as_flag(field, default)}")
        yield f"--config.section.field={field}={value}"


def require(**examples: str) -> None:
    """Refuse a command that lacks one of these flags, and show the command as it was typed, with them.

    Raises:
        UserError: as said.
    """
    if missing := [name for name in examples if not flags.FLAGS[name].value]:
        words = [word for word in sys.argv[1:] if word.partition("=")[0].lstrip("-") not in missing]
        words += [f"--{name}={examples[name]}" for name in missing]
        mended = " ".join(map(quoted, words))
        program = pathlib.Path(sys.argv[0])
        name = program.parent.name if program.stem == "__main__" else program.stem
        raise UserError(f"--{missing[0]} is missing: python -m spin_jax.{name} {mended}")


# ---- the config


def config(optional: bool = False) -> ConfigDict:
    """The config of the file, as the flags changed it; where the file is `optional`, of the defaults without one.

    Raises:
        UserError: the file is no config, or a value is not of its field's kind.
    """
    loaded = config_lib.base_config() if optional and not config_file() else load_config(config_file())
    changes = [change.partition("=") for change in _CHANGES.value]
    config_lib.override(loaded, {field: _read(value, _default(field)) for field, _, value in changes})
    return loaded


def config_file() -> str:
    """The config's file and argument as they were given, such as "configs/zephyr_7b.py:v5e-16"."""
    return _CONFIG.value or ""


def _default(field: str) -> object:
    check_names([field], FIELDS)
    return FIELDS[field].default


def _read(text: str, default: object) -> object:
    """Parse a value that was typed. Text that cannot be parsed stays text, which `config.freeze` refuses."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def load_config(name: str) -> ConfigDict:
    """What the config file returns for its argument. It may import the files beside it, as a script may."""
    file, colon, argument = name.partition(":")
    if not os.path.exists(file) or os.path.isdir(file):
        what = "is a directory" if os.path.isdir(file) else "no such file"
        is_field = name.partition("=")[0] in FIELDS
        advice = f"did you mean --config.{name}?" if is_field else f"write a file, as --config={_like(file)}"
        raise UserError(f"--config={quoted(name)}: {what}; {advice}")
    if (directory := str(pathlib.Path(file).resolve().parent)) not in sys.path:
        sys.path.append(directory)  # last: a file there called like a library does not take its place
    try:
        module = sys.modules["spin_jax_config"] = types.ModuleType("spin_jax_config")
        module.__file__ = file
        exec(compile(pathlib.Path(file).read_bytes(), file, "exec"), vars(module))
        get_config = _checked(file, argument if colon else None, getattr(module, "get_config", None))
        loaded = get_config(argument) if colon else get_config()
    except UserError as error:
        raise UserError(f"--config={quoted(name)}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        raise UserError(f"--config={quoted(name)}: {_where(error, file)}; mend the file") from None
    if type(loaded) is not ConfigDict:
        what = "None" if loaded is None else f"a {type(loaded).__name__}"
        raise UserError(
            f"--config={quoted(name)}: get_config() returns {what}: let it return the config of "
            "spin_jax.config.base_config(), changed"
        )
    return loaded


def _like(file: str) -> str:
    """The config file whose name is closest to that of a missing one."""
    there = [str(path) for path in [*pathlib.Path("configs").glob("*.py"), *pathlib.Path(file).parent.glob("*.py")]]
    return (difflib.get_close_matches(file, there, n=1, cutoff=0) or ["configs/base.py"])[0]


def _checked(file: str, argument: str | None, get_config: Callable | None) -> Callable:
    """Return the file's get_config(), checked to take the argument that was given, or none."""
    if not callable(get_config):
        raise UserError("has no get_config(): write one that returns spin_jax.config.base_config(), changed")
    try:
        inspect.signature(get_config).bind(*([] if argument is None else [argument]))
    except TypeError:
        if argument is None:
            raise UserError(f"its get_config() takes an argument: write --config={quoted(file)}:ARGUMENT") from None
        hint = " (the compile check is told the slice by --slice)" if is_slice(argument) else ""
        raise UserError(f"its get_config() takes no argument: write --config={quoted(file)}{hint}") from None
    return get_config


def _where(error: BaseException, file: str) -> str:
    """The line of the file that raised an error, and what it says."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    text = (str(error).strip().splitlines() or [""])[-1]  # ml_collections' advice comes last, with half of its quotes
    text = text.removesuffix("'") if text.count("'") == 1 else text
    at = f"its line {lines[-1]} raises " if lines else ""
    return f"{at}{type(error).__name__}" + (f" ({text})" if text else "")
