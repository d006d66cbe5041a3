"""Keep compiled programs on disk, in jax's own cache, for the next start that needs the same ones.

The cache's keys hold all that a program depends on, also the kind of device and jax's version, so all runs share it.
"""

import logging
import os
import pathlib
from typing import Any

import jax
from etils import epath

from spin_jax.runtime import multihost
from spin_jax.runtime.files import is_remote, user_cache

# Of all of a user's programs. Beyond it jax drops those not used for longest. One has 0.1 to some tens of MB.
MAX_BYTES = 4 * 2**30

_LOG = logging.getLogger(__name__)


def keep(output: epath.Path | None = None) -> None:
    """Keep programs that take more than a second to compile, from here on, in `~/.cache/spin_jax/compiled`.

    Keep them beside `output` instead, if that is in a bucket or several processes share it: all processes read them,
    process 0 alone writes, and they are not lost with a preempted machine. If the user has set
    JAX_COMPILATION_CACHE_DIR, do nothing. Warn if the directory cannot be written.

    Args:
        output: a workdir, or a file of answers.
    """
    if _setting("jax_compilation_cache_dir") is not None:
        return
    shared = output is not None and (is_remote(output) or multihost.are_several())
    directory = user_cache("compiled")
    if output is not None and shared:  # a whole bucket has nothing beside it (its parent is "gs://"): use its inside
        directory = (output if os.fspath(output.parent).endswith("/") else output.parent) / "compiled"
    if is_remote(directory):
        # jax would also give XLA a place here for its GPU tuning results, which XLA can write to a local disk only.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    else:
        try:
            _prepare(directory, bounded=not shared)
        except OSError as error:
            _LOG.warning(
                "%s cannot be written (%s): compiled programs are not kept; set JAX_COMPILATION_CACHE_DIR to a "
                "directory that can",
                *(directory, error.strerror or error),
            )
            return
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))


def _prepare(directory: epath.Path | pathlib.Path, bounded: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".lockfile").touch()  # jax makes this file later: find out now whether it can
    if not bounded:
        return
    if _setting("jax_compilation_cache_max_size") == -1:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    for program in directory.glob("*-cache"):
        # jax writes a program, then the time of its last use. A kill between the two leaves a program without a time,
        # which would keep jax from writing any other.
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)


def _setting(name: str) -> Any:
    """A value of jax's config, some of whose names the type checker does not know."""
    return getattr(jax.config, name)
