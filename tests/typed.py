"""Commands as they are typed, up to where they would import jax: what they read, and what they refuse."""

import pathlib
import shlex
import sys

import pytest
from absl.testing import flagsaver

from spin_jax import generate, main
from spin_jax.compile_check import __main__
from spin_jax.config import Config, flatten, freeze
from spin_jax.errors import UserError
from spin_jax.runtime import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
# To each, a command line that is right.
RIGHT = {
    main: "--config=configs/base.py --workdir=w --config.model.path=m --config.data.train=d --check_for=0",
    generate: "--config=configs/base.py --prompts=p --out=o --config.model.path=m",
    __main__: "--config=configs/base.py --slice=v5e-8 --config.model.path=m --config.data.train=d",
}


def start(program, line: str) -> Config:
    """A command up to where it would import jax: its config."""
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [program.__name__.replace(".", "/") + ".py", *shlex.split(line)])
        cli.parse_flags(sys.argv)
        if program is main:
            assert main.main([]) == 0
            return freeze(cli.config())
        return __main__.config_and_slice()[0] if program is __main__ else generate.sampling_config()


def read(words: str) -> dict[str, object]:
    """The fields that flags make of configs/base.py."""
    return flatten(start(main, f"{RIGHT[main]} {words}"))


def refusal(program, line: str) -> str:
    """The one line with which it is refused."""
    with pytest.raises(UserError) as refused:
        start(program, line)
    message = str(refused.value)
    assert "\n" not in message and "Traceback" not in message
    return message
