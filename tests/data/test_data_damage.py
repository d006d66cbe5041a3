"""Files that are damaged, or are not what their names say: one line with the file and what to do."""

import importlib.util
import json
import os
import pathlib
import tempfile

import pytest
from data_rows import read, user, write_lines, write_parquet

from spin_jax.data.sources import Example, Skip, load_examples, load_prompts
from spin_jax.errors import UserError

ROW = {"prompt": "q", "response": "a"}
DAMAGED = "it is damaged or not whole; copy or download it again$"


def refusal(source: object) -> str:
    """What is said, in one line, of a source that cannot be read; the same for training and for sampling."""
    with pytest.raises(UserError) as refused:
        load_examples(str(source))
    with pytest.raises(UserError) as as_prompts:
        load_prompts(str(source))
    message = str(refused.value)
    assert message == str(as_prompts.value) and "\n" not in message and str(source) in message
    return message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "run `git lfs pull`, or download",
        ),
        (b"<!DOCTYPE html>\n<html></html>", "a web page instead of the data"),
        (b"\x1f\x8b\x08\x00", "packed with gzip: unpack it with gunzip"),
        (b"\x28\xb5\x2f\xfd\x00", "packed with zstd"),
        (b"PK\x03\x04\x00", "a zip archive"),
        ('[{"prompt": "q"}]\n'.encode("utf-16"), "UTF-16 text: save it as UTF-8"),
    ],
)
def test_another_thing_under_the_name_of_data(tmp_path, suffix, content, message):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize("content, suffix", [(b"PAR1\x15\x04", ".parquet"), (b"\xef\xbb\xbf[\n {}\n]", ".json")])
def test_a_whole_file_that_is_called_lines(tmp_path, content, suffix):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert refusal(path) == f"{path} is no file of one object a line: name it {suffix}"


def test_empty_files(tmp_path):
    for name in ("a.json", "a.parquet"):
        (tmp_path / name).write_bytes(b"")
        assert refusal(tmp_path / name) == f"{tmp_path / name} is empty: copy or download it again"
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl: no row can be used: there are no rows in it: copy or download"):
        load_examples(str(tmp_path / "a.jsonl"))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    line = json.dumps(ROW).encode()
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([mark + line, mark, mark + line]))  # as if three files were joined
    (tmp_path / "a.json").write_bytes(mark + b"[" + line + b"]")
    expected = Example(0, (user("q"),), "a")
    assert load_examples(str(tmp_path / "a.json")).examples == [expected]
    assert [example.response for example in load_examples(str(tmp_path / "a.jsonl")).examples] == ["a", "a"]


def test_json_that_is_nested_too_deeply(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.json").write_text(deep)
    assert "a.json: not valid JSON: maximum recursion depth" in refusal(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not valid JSON: maximum recursion depth"):
        read(tmp_path, [ROW, deep])
    as_deep_as_json_goes = '{"prompt": "q", "response": "a", "tools": ' + "[" * 900 + "]" * 900 + "}"
    found = load_examples(write_lines(tmp_path / "b.jsonl", [ROW, as_deep_as_json_goes]))
    assert found.skipped == [Skip(1, "a row with tools")]


# ---- Parquet: damage that shows at the opening, and damage that shows while rows are read


def test_a_parquet_file_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    assert "a.parquet: not a Parquet file" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("damage", ["a page", "the footer", "the end", "the text"])
def test_a_parquet_file_that_is_damaged(tmp_path, damage):
    rows = [{"prompt": f"question {number}", "response": "a" * 50} for number in range(2000)]
    path = pathlib.Path(write_parquet(tmp_path / "a.parquet", rows))
    content = bytearray(path.read_bytes())
    if damage == "a page":
        content[len(content) // 3 : len(content) // 3 + 100] = bytes(range(100, 200))
    elif damage == "the footer":
        content[-300:-100] = bytes(range(200))
    elif damage == "the end":
        del content[-1000:]
    else:
        import pyarrow
        import pyarrow.parquet

        no_text = [None, pyarrow.py_buffer(b"\0\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"ab\xff")]
        column = pyarrow.Array.from_buffers(pyarrow.string(), 1, no_text)
        pyarrow.parquet.write_table(pyarrow.table({"prompt": column, "response": ["a"]}), path)
        content = path.read_bytes()
    path.write_bytes(content)
    assert refusal(path).endswith("it is damaged or not whole; copy or download it again")


def test_a_damaged_file_of_a_directory_is_named(tmp_path):
    write_lines(tmp_path / "part-0.jsonl", [ROW])
    (tmp_path / "part-1.parquet").write_text("PAR1 no")
    with pytest.raises(UserError, match=rf"{tmp_path}/part-1\.parquet: not a Parquet file: .*{DAMAGED}"):
        load_examples(str(tmp_path))


# ---- what `datasets` saves


@pytest.mark.parametrize(
    "name, content",
    [
        ("data-00000-of-00001.arrow", None),
        ("data-00000-of-00001.arrow", b""),
        ("data-00000-of-00001.arrow", b"version https://git-lfs.github.com/spec/v1\n"),
        ("state.json", b""),
        ("state.json", b"[]"),
        ("dataset_info.json", None),
        ("dataset_info.json", b"[]"),
    ],
)
def test_a_saved_data_set_that_is_damaged(tmp_path, name, content):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROW]).save_to_disk(tmp_path / "saved")
    if content is None:
        (tmp_path / "saved" / name).unlink()
    else:
        (tmp_path / "saved" / name).write_bytes(content)
    assert refusal(tmp_path / "saved").endswith("it is damaged or not whole; copy or download it again")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"splits": ["train"]}'])
def test_saved_splits_that_are_damaged(tmp_path, content):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([ROW])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").write_bytes(content)
    assert refusal(tmp_path / "saved").endswith("it is damaged or not whole; copy or download it again")


# ---- what cannot be reached


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, to become nobody")
@pytest.mark.parametrize("mode", [0o000, 0o711])
@pytest.mark.parametrize("name", [".", "a.jsonl"])
def test_what_may_not_be_read(mode, name):
    with tempfile.TemporaryDirectory() as parent:
        private = pathlib.Path(parent) / "private"
        private.mkdir()
        write_lines(private / "a.jsonl", [ROW])
        os.chmod(private / "a.jsonl", 0o000)
        os.chmod(private, mode)
        os.chmod(parent, 0o755)
        os.seteuid(65534)
        try:
            message = refusal(private / name)
        finally:
            os.seteuid(0)
    assert message.endswith("give your user the right to read it")


@pytest.mark.parametrize(
    "source, message",
    [
        ("s3://bucket/a.jsonl", "reading s3:// needs one package more: pip install s3fs"),
        ("gs://bucket/data", "reading gs:// needs one package more: pip install gcsfs"),
        ("https://host/a.jsonl", "https:// is not read; download the data and give its local path"),
        ("hdfs://host/a.jsonl", "hdfs:// is not read; download the data and give its local path"),
        ("r2://bucket/a.parquet", "r2:// is not read; download the data and give its local path"),
    ],
)
def test_stores_that_cannot_be_read_say_what_to_do(source, message):
    package = message.rpartition(" ")[2]
    if package in ("s3fs", "gcsfs") and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert refusal(source) == f"{source}: {message}"


def test_a_file_url_is_a_path(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [ROW])
    assert load_examples(f"file://{source}").examples == [Example(0, (user("q"),), "a")]


def test_packed_files_are_to_be_unpacked(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    assert "a.jsonl.gz: cannot tell what this file is; name it .jsonl" in refusal(tmp_path / "a.jsonl.gz")
    assert "unpack it" in refusal(tmp_path / "a.jsonl.gz")
