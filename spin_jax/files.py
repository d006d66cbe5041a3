"""Files of a user's making: read, or refused in one line that names the file and what to do about it."""

import json
from typing import Any

from etils import epath

from spin_jax.errors import UserError

LFS_POINTER = b"version https://git-lfs"
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


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
    """Like `read_json`, but an absent file is an empty object."""
    return read_json(file) if epath.Path(file).exists() else {}
