"""Expand paths as users write them; read and write files so that a failure is one line that names the file."""

import contextlib
import errno
import glob
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from spin_jax.errors import UserError

LFS_POINTER = b"version https://git-lfs"
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
# What to do about errors of the operating system while writing.
_REMEDIES = {
    errno.ENOSPC: "make room, and start the same again: it goes on from here",
    errno.EDQUOT: "make room within the quota, and start the same again: it goes on from here",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), and start the same again: it goes on from here",
}


def expand(path: epath.PathLike) -> epath.Path:
    """Expand a leading `~` or `~USER` to a home directory, since no shell has done so for a path in a config.

    Raises:
        UserError: there is no such user, or the path is an object store's that cannot be used.
    """
    name = os.path.expanduser(os.fspath(path))
    if name.startswith("~"):
        raise UserError(f"{name}: there is no user {name.split('/')[0][1:]} whose home it could be in; write ./{name}")
    if is_remote(name) and not name.startswith("gs://"):
        raise UserError(f"{name}: of object stores, gs:// alone is supported; give a directory or gs://BUCKET/PATH")
    return epath.Path(name)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is an object store's (gs://...), not this machine's."""
    return "://" in os.fspath(path)


def user_cache(name: str) -> pathlib.Path:
    """This user's cache directory of that name, for files that can be made again; it may not exist yet."""
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if cache.startswith("~"):  # a user without a home, as in some containers
        cache = os.path.join(tempfile.gettempdir(), f"cache-of-{os.getuid()}")
    return pathlib.Path(cache) / "spin_jax" / name


# ---- written


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that a reader never sees half of it.

    Raises:
        UserError: it cannot be written; see `writing`.
    """
    path = epath.Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """Turn any error while writing at or under `path` into one line: why, and how much space is free.

    Raises:
        UserError: the disk is full, the directory read-only, the object store cannot be reached.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (code := _os_error(error)) is not None:
            name = str(getattr(error, "filename", None) or path)
            where = path if name.startswith(os.fspath(path)) else name  # else a temporary file, on another disk maybe
            free = _free(where) if code in _REMEDIES else ""
            remedy = _REMEDIES.get(code, "mend that, or write elsewhere")
            raise UserError(f"{where} cannot be written: {os.strerror(code)}{free}; {remedy}") from error
        if isinstance(error, OSError):  # epath's own have no number
            raise UserError(f"{path} cannot be written: {first_line(error)}; mend that, or write elsewhere") from error
        if isinstance(error, ImportError) and is_remote(path):
            raise UserError(f"{path}: gs:// needs a package that is not installed: pip install gcsfs") from error
        if is_remote(path):  # its client raises what it likes
            raise UserError(f"{path} cannot be written: {type(error).__name__}: {first_line(error)}") from error
        raise


def _os_error(error: Exception) -> int | None:
    """The operating system's number of an error, also of one that tensorstore raised while writing a checkpoint."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _free(path: epath.PathLike) -> str:
    """Return the free space of the disk on which a path lies or would lie, as " (12.3 MB are free there)"."""
    if is_remote(path):
        return ""
    there = next(parent for parent in (pathlib.Path(path), *pathlib.Path(path).absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    return f" ({free / 1e6:,.1f} MB are free there)" if free < 1e9 else f" ({free / 1e9:,.1f} GB are free there)"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


# ---- read


@contextlib.contextmanager
def reading(path: epath.PathLike, remedy: str) -> Iterator[None]:
    """Turn any error that a library raises over a damaged file into one line that ends in `remedy`.

    Raises:
        UserError: in place of any other exception.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): {remedy}") from error


def read_bytes(file: epath.PathLike) -> bytes:
    """All of a file; raises UserError where it cannot be read, is empty, or is what Git LFS left in its place."""
    try:
        content = epath.Path(file).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: not found") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    if content.startswith(LFS_POINTER):
        raise UserError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` beside it")
    if not content.strip():
        raise UserError(f"{file}: empty; download it again, or delete it if it is not needed")
    return content


def read_json(file: epath.PathLike) -> dict[str, Any]:
    """The object in a JSON file; raises UserError where there is none."""
    content = read_bytes(file)
    if content.startswith(_BYTE_ORDER_MARKS):
        raise UserError(f"{file}: begins with a byte-order mark; save it as UTF-8 without one")
    try:
        parsed = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); mend it, or download it again") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{file}: holds a JSON {type(parsed).__name__}, not an object; download it again")
    return parsed


def read_json_if_there(file: epath.PathLike) -> dict[str, Any]:
    """Like `read_json`, but return {} if the file is absent. A link whose file is gone does not count as absent."""
    return read_json(file) if epath.Path(file).exists() or os.path.islink(file) else {}


def find(directory: epath.PathLike, pattern: str) -> list[epath.Path]:
    """Paths that match a pattern in a directory, sorted. The directory's name is escaped first: epath's glob would read
    brackets in it as part of the pattern."""
    return sorted(epath.Path(glob.escape(os.fspath(directory))).glob(pattern))
