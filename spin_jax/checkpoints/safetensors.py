"""The safetensors file format, a tensor at a time.

A file is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the tensors.
`safetensors.numpy` reads and writes whole dicts of arrays; here reading maps a tensor, so that any view of it reads
only what it shows, and writing streams. https://huggingface.co/docs/safetensors
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from spin_jax.errors import UserError
from spin_jax.runtime.files import LFS_POINTER

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors package has it


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The tensor as a read-only view of its file: nothing is read until it is indexed and copied."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def read_header(file: epath.PathLike) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
        UserError: not a safetensors file, truncated, or with tensors that are neither f32, f16 nor bf16.
    """
    file = epath.Path(file)
    header, data_start, size = _parse(file)
    header.pop("__metadata__", None)
    places = [(*_place(file, name, entry), name) for name, entry in header.items()]
    tensors, end = {}, 0
    # The format leaves no gaps: a tensor begins where the one before it ends, and the last one ends the file.
    for start, stop, dtype, shape, name in sorted(places):
        if dtype not in DTYPES:
            raise UserError(f"{file}: {name} is stored as {dtype}; only {', '.join(DTYPES)} weights are supported")
        tensors[name] = StoredTensor(file, DTYPES[dtype], shape, data_start + start)
        if (start, stop) != (end, end + tensors[name].nbytes):
            raise UserError(
                f"{file}: damaged, its header puts {name} at bytes {start} to {stop}, where one of {dtype} {shape} is "
                f"{tensors[name].nbytes} bytes from {end} on; download it again"
            )
        end = stop
    if data_start + end != size:
        what = "truncated" if data_start + end > size else "damaged"
        raise UserError(f"{file}: {what}, {size} bytes where its tensors end at {data_start + end}; download it again")
    return tensors


def _parse(file: epath.Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the tensors begin, size of the file), the last two in bytes."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            size = stream.tell()
            stream.seek(0)
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            encoded = stream.read(min(length, _LONGEST_HEADER))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    if size >= 8 and LFS_POINTER.startswith(first):
        raise UserError(f"{file}: a Git LFS pointer, not a safetensors file; run `git lfs pull` beside it")
    if size < 8 or 8 + length > size or length > _LONGEST_HEADER:
        raise UserError(f"{file}: truncated, or not a safetensors file ({size} bytes); download it again")
    try:
        header = json.loads(encoded)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{file}: not a safetensors file (its header is not JSON, or no object); download it again")
    return header, 8 + length, size


def _place(file: epath.Path, name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """(start, stop, dtype, shape) of a tensor as the header has them, the first two in bytes of the data."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            if all(isinstance(size, int) and size >= 0 for size in shape):
                return start, stop, dtype, tuple(shape)
    raise UserError(f"{file}: damaged, its header does not say where {name} lies, of what dtype and shape")


def write(
    file: pathlib.Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Writes tensors of one dtype, in the order of `shapes`, taking each from `tensors` when its turn comes."""
    code = next(code for code, each in DTYPES.items() if each == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts at a multiple of 8

    def write_to(stream: BinaryIO) -> None:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            stream.write(np.ascontiguousarray(tensor, dtype).view(np.uint8).data)  # bfloat16 has no buffer of its own

    write_whole(file, write_to)


def write_whole(file: pathlib.Path, write_to: Callable[[BinaryIO], object]) -> None:
    """A reader sees the whole file or none: it is written beside its name, flushed to the disk and renamed."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        write_to(stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
