"""The safetensors reader against files that are damaged, and against what the safetensors package writes."""

import json
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from spin_jax.checkpoints.safetensors import read_header
from spin_jax.errors import UserError

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, ml_dtypes.bfloat16)}
HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(file: pathlib.Path, header: object, data: bytes = bytes(32)) -> pathlib.Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return file


def refusal(file: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        read_header(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("remote", [False, True])
def test_tensors_are_mapped_where_they_lie(tmp_path, monkeypatch, remote):
    """An object store's files are read without the package, which opens local ones."""
    monkeypatch.setattr("spin_jax.checkpoints.safetensors.is_remote", lambda path: remote)
    safetensors.numpy.save_file(TENSORS, tmp_path / "x", {"format": "pt", "a": "b"})
    for path in (tmp_path / "x", epath.Path(tmp_path / "x"), str(tmp_path / "x")):
        stored = read_header(path)
        assert stored.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            mapped = stored[name].map()
            assert (
                isinstance(mapped, np.memmap) and mapped.dtype == tensor.dtype and stored[name].nbytes == tensor.nbytes
            )
            np.testing.assert_array_equal(mapped, tensor)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"a": []}, "invalid JSON in header"),
        ({"a": None}, "invalid JSON in header"),
        ({"a": {}}, "invalid JSON in header"),
        ({"a": "F32"}, "invalid JSON in header"),
        ({"b": {"shape": [4], "data_offsets": [24, 32]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "data_offsets": [24, 32]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": [4]}}, "invalid JSON in header"),
        ({"b": {"dtype": ["BF16"], "shape": [4], "data_offsets": [24, 32]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": 4, "data_offsets": [24, 32]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": [-4], "data_offsets": [24, 32]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": ["4"], "data_offsets": [24, 32]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [24]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32, 40]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": [4], "data_offsets": ["24", "32"]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": [4], "data_offsets": {"24": 32}}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 30]}}, "invalid shape, data type, or offset"),
        ({"b": {"dtype": "BF16", "shape": [3], "data_offsets": [24, 32]}}, "invalid shape, data type, or offset"),
        ({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [20, 28]}}, "invalid offset for tensor `b`"),
        ({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [26, 34]}}, "invalid offset for tensor `b`"),
        ({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [32, 24]}}, "invalid offset for tensor `b`"),
        ({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [-8, 0]}}, "invalid JSON in header"),
        ({"b": {"dtype": "BF16", "shape": [10**30], "data_offsets": [24, 32]}}, "invalid JSON in header"),
        ({"b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]}}, "b is stored as I64"),
        ({"b": {"dtype": "F99", "shape": [1], "data_offsets": [24, 32]}}, "unknown variant `F99`"),
        ({"c": HEADER["b"]}, "invalid offset for tensor"),
        ({"c": {"dtype": "F32", "shape": [1], "data_offsets": [32, 36]}}, "file not fully covered"),
    ],
)
def test_headers_that_do_not_describe_the_file(tmp_path, change, expected):
    file = write(tmp_path / "x", HEADER)
    assert read_header(file).keys() == {"a", "b"}
    assert expected in refusal(write(file, HEADER | change))


@pytest.mark.parametrize("header", [b"not json", b"[]", b"null", b'"a"', b"[" * 100_000, b"\xff\xfe\x00", b"{"])
def test_headers_that_are_no_object(tmp_path, header):
    assert re.search(r"invalid (JSON|UTF-8) in header.*\): download it again", refusal(write(tmp_path / "x", header)))


def test_files_that_are_too_short_or_too_long(tmp_path):
    file = write(tmp_path / "x", HEADER)
    whole = file.read_bytes()
    for length in (0, 5, 8, 20, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "download it again" in refusal(file)
    file.write_bytes(whole + b"1")
    assert "file not fully covered" in refusal(file)
    file.write_bytes((2**63).to_bytes(8, "little") + whole[8:])
    assert "header too large" in refusal(file)


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    """A large file of something else: its first bytes as a length may well be within it."""
    with (tmp_path / "x").open("wb") as stream:
        stream.write((4 * 10**9).to_bytes(8, "little"))
        stream.truncate(5 * 10**9)  # without blocks on the disk
    assert "header too large" in refusal(tmp_path / "x")


def test_what_is_no_file_of_tensors(tmp_path):
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 269060552\n")
    assert "a Git LFS pointer, not a safetensors file; run `git lfs pull`" in refusal(tmp_path / "x")
    (tmp_path / "y").mkdir()
    assert "Is a directory" in refusal(tmp_path / "y")
