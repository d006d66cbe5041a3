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

from spin_jax.errors import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def map(self) -> np.ndarray:
        """The tensor as a read-only view of its file: nothing is read until it is indexed and copied."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
        UserError: not a safetensors file, truncated, or with tensors that are neither f32, f16 nor bf16.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        data_start = 8 + int.from_bytes(stream.read(8), "little")
        if size < 8 or data_start > size:
            raise UserError(f"{file}: truncated, or not a safetensors file ({size} bytes); download it again")
        try:
            header = json.loads(stream.read(data_start - 8))
        except ValueError:
            raise UserError(f"{file}: not a safetensors file (its header is not JSON)") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            supported = ", ".join(DTYPES)
            raise UserError(f"{file}: {name} is stored as {entry['dtype']}; only {supported} weights are supported")
        start, stop = (data_start + offset for offset in entry["data_offsets"])
        if stop > size:
            raise UserError(f"{file}: truncated, {size} bytes where {name} ends at {stop}; download it again")
        tensors[name] = StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return tensors


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
