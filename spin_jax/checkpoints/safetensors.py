"""The safetensors file format, a tensor at a time.

A file is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the tensors.
The package `safetensors` checks files here, but it opens local files only, and writes tensors that are all in memory.
The code below also finds tensors in object stores, reads only the parts of a tensor that are used, and writes one
tensor after the other. https://huggingface.co/docs/safetensors
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from spin_jax.errors import UserError
from spin_jax.runtime.files import LFS_POINTER, is_remote, reading

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


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
        """Map the tensor, as a read-only view of its file. Nothing is read until the view is copied."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def read_header(file: epath.PathLike) -> dict[str, StoredTensor]:
    """Return where the tensors of a file lie, by name.

    Raises:
        UserError: it is not a safetensors file, is truncated, or has tensors other than f32, f16 and bf16.
    """
    file = epath.Path(file)
    with reading(file, "download it again"):
        with file.open("rb") as stream:
            first = stream.read(8)
            if len(first) == 8 and LFS_POINTER.startswith(first):
                raise UserError(f"{file}: a Git LFS pointer, not a safetensors file; run `git lfs pull` beside it")
            if not is_remote(file):
                with safetensors.safe_open(file, "numpy"):  # checks that the header describes this very file
                    pass
            length = int.from_bytes(first, "little")
            header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{file}: {name} is stored as {entry['dtype']}; only {', '.join(DTYPES)} weights are supported"
            )
    return {
        name: StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def write(
    file: pathlib.Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Write tensors of one dtype, in the order of `shapes`. Take each from `tensors` when its turn comes."""
    code = next(code for code, each in DTYPES.items() if each == dtype)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
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
    """Write a file under another name, flush it to the disk and rename it, so that readers see all of it or none."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        write_to(stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
