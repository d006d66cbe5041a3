"""A source's rows, as they are: of files, saved data sets, the Hub and TFDS. `data/sources.py` knows their columns."""

import json
import re
from collections.abc import Iterator

import numpy as np
from etils import epath

from spin_jax.errors import UserError

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
SPLIT_NAMES = r"(train|test|validation|valid|val|dev|eval)([_.-]|$)"


def read_rows(source: str, split: str) -> Iterator[tuple[str, object]]:
    """(where, row) one after another; `where` names the row to whoever has to mend it. `load_examples` says what a
    source may be.

    Raises:
        UserError: the source cannot be read; while iterating, too.
    """
    if source.startswith("tfds:"):
        return _read_tfds(source.removeprefix("tfds:"), split)
    if source.startswith("hub:"):
        return _read_hub(source.removeprefix("hub:"), split)
    path = epath.Path(source).expanduser()
    if path.is_dir():
        return _read_directory(path, split)
    if path.exists():
        return _read_file(path)
    if path.suffix in FILE_SUFFIXES or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        raise UserError(f"{source}: no such file or directory (a Hub data set is written org/name or hub:name)")
    return _read_hub(source, split)


def _read_file(path: epath.Path) -> Iterator[tuple[str, object]]:
    if path.suffix not in FILE_SUFFIXES:
        raise UserError(f"{path}: cannot tell what this file is; name it {', '.join(FILE_SUFFIXES)}")
    return {".json": _read_json, ".parquet": _read_parquet}.get(path.suffix, _read_json_lines)(path)


def _read_json_lines(path: epath.Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
                raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
            yield f"{path}:{number}", row


def _read_json(path: epath.Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error} (one object a line? then name it .jsonl)") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of rows, not {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{path} row {index}", row


def _read_parquet(path: epath.Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a Parquet file: {error}") from None
        index = 0
        for batch in table.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                yield f"{path} row {index}", row
                index += 1


def _read_directory(path: epath.Path, split: str) -> Iterator[tuple[str, object]]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_saved_dataset(path, split)
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    files = sorted(file for folder in folders for file in folder.iterdir() if file.suffix in FILE_SUFFIXES)
    # train_sft-00000-of-00003.parquet is one shard of train_sft
    stems = {file: re.sub(r"-\d+-of-\d+.*", "", file.stem) for file in files}
    chosen = [file for file in files if stems[file] == split]
    variants = {stem for stem in stems.values() if re.match(rf"{re.escape(split)}[_.-]", stem)}
    if not chosen and len(variants) == 1:  # train_small.jsonl alone is the train split; train_sft with train_gen is not
        chosen = [file for file in files if stems[file] in variants]
    # Files that name no split at all are training data, as on the Hub.
    if split == "train" and not any(re.match(SPLIT_NAMES, stem) for stem in stems.values()):
        chosen = files
    if not chosen:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path}: no {'/'.join(FILE_SUFFIXES)} file of split {split!r}; files there: {names}")
    return (row for file in chosen for row in _read_file(file))


def _read_saved_dataset(path: epath.Path, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{path}: no split {split!r}; there are: {', '.join(data)}")
        data = data[split]
    return ((f"{path} row {index}", row) for index, row in enumerate(data))


def _read_hub(name: str, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(repository, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # a RuntimeError: the data set is a script
        raise UserError(f"{name}: the Hub gave no split {split!r}: {_hub_advice(error)}") from error
    return ((f"{name} row {index}", row) for index, row in enumerate(data))


def _hub_advice(error: Exception) -> str:
    message = " ".join(str(error).split())
    if "gated" in message or "authenticated" in message:
        return "ask for access on its page, then run `hf auth login`"
    if isinstance(error, FileNotFoundError) and "offline" not in message.lower():
        return f"no such data set or local path ({message})"
    if isinstance(error, OSError):
        return "it cannot be reached from here; download the data set once and give its local path"
    return message


def _read_tfds(name: str, split: str) -> Iterator[tuple[str, object]]:
    try:
        import tensorflow_datasets
    except ImportError:
        raise UserError("reading tfds:... needs TensorFlow Datasets: pip install 'spin_jax[tfds]'") from None
    try:
        data = tensorflow_datasets.data_source(name, split=split)
    # No network or disk; a server that refuses; no such data set, configuration or split; data that was prepared
    # earlier in a format that cannot be read row by row. All else is a bug, and shown as one.
    except (OSError, tensorflow_datasets.download.DownloadError, ValueError, NotImplementedError) as error:
        advice = str(error).partition("\n")[0]  # the lines after it list every data set there is
        raise UserError(f"tfds:{name}: cannot load split {split!r}: {advice}") from error
    rows = (data[index] for index in range(len(data)))
    return (
        (f"tfds:{name} row {index}", {column: _plain(value) for column, value in row.items()})
        for index, row in enumerate(rows)
    )


def _plain(value: object) -> object:
    """A TFDS value as JSON would give it: text for bytes, a list of turns for TFDS's one dict of lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        columns = [_plain(column) for column in value.values()]
        return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    return value
