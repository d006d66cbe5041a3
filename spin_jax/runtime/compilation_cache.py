"""Compiled programs on disk, for the next start that needs the same ones: jax's own cache, and where it lies.

Its keys hold all that a program depends on, the kind of device and jax's version too: runs share it, whatever they are.
"""

import logging
import os
import pathlib
from typing import Any

import jax
from etils import epath

from spin_jax.runtime import multihost
from spin_jax.runtime.files import is_remote, user_cache

# Of a user's programs together; beyond it jax drops those used longest ago. One is 0.1 to some tens of MB.
MAX_BYTES = 4 * 2**30

_LOG = logging.getLogger(__name__)


def keep(output: epath.Path | None = None) -> None:
    """From here on programs that take more than a second to compile are kept, in `~/.cache/spin_jax/compiled`; or
    beside the output (a workdir, a file of answers), where that is in a bucket or several processes share it: there the
    first process alone writes, all read, and a machine that is preempted takes nothing along.

    Whoever sets JAX_COMPILATION_CACHE_DIR has another place in mind. A place that cannot be written is warned of.
    """
    if _setting("jax_compilation_cache_dir") is not None:
        return
    shared = output is not None and (is_remote(output) or multihost.are_several())
    directory = user_cache("compiled")
    if output is not None and shared:  # beside it, or in it where it is a whole bucket, whose parent is "gs://"
        directory = (output if os.fspath(output.parent).endswith("/") else output.parent) / "compiled"
    if is_remote(directory):
        # jax derives from it where XLA keeps what it found in tuning for GPUs, and XLA's own files are local only.
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
    (directory / ".lockfile").touch()  # jax's; now is the time to find out whether it can be
    if not bounded:
        return
    if _setting("jax_compilation_cache_max_size") == -1:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    for program in directory.glob("*-cache"):
        # jax writes when a program was used last after the program itself. One without was torn by a kill, and would
        # keep jax from writing any other.
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)


def _setting(name: str) -> Any:
    """A value of jax's config, whose names types do not see."""
    return getattr(jax.config, name)
