"""Read the rows of files, saved data sets, the Hub and TFDS. What their columns mean is known to `data/sources.py`."""

import codecs
import collections
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from etils import epath

from spin_jax.data.directories import FILE_SUFFIXES, files_of_split, is_saved_dataset
from spin_jax.errors import UserError

NAMED = 20  # mistakes that a message names at most

# How files begin that are named like data but hold no rows, and what to do about them.
_NO_ROWS = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the data: run `git lfs pull`, or download the file"),
    (b"<", "a web page instead of the data: download the file itself"),
    (b"\x1f\x8b", "packed with gzip: unpack it with gunzip, and name it by what is in it"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd: unpack it with unzstd, and name it by what is in it"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (codecs.BOM_UTF16_LE, "UTF-16 text: save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text: save it as UTF-8"),
)
_MISNAMED = ((b"PAR1", ".parquet"), (b"[", ".json"))  # how files begin that are wrongly called .jsonl
_STORES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # the packages with which etils reads object stores

T = TypeVar("T")
Item = TypeVar("Item")


class Place(NamedTuple):
    """Where a row is, for a user who has to mend it: FILE:LINE or FILE row NUMBER."""

    before: str
    number: int


class Mistakes:
    """Gathers the rows that stop a load, so that one message names all of them."""

    def __init__(self):
        self._count = 0
        self._numbers: dict[tuple[str, str], list[str]] = collections.defaultdict(list)  # by (Place.before, mistake)

    def add(self, place: Place, mistake: Exception) -> None:
        self._count += 1
        if self._count <= NAMED:
            self._numbers[place.before, str(mistake)].append(str(place.number))

    def refuse(self) -> None:
        """Stop if a mistake was added.

        Raises:
            UserError: with the first `NAMED` mistakes.
        """
        if self._count:
            named = [f"{before}{', '.join(numbers)}: {what}" for (before, what), numbers in self._numbers.items()]
            more = [f"and {self._count - NAMED:,} more rows"] if self._count > NAMED else []
            raise UserError("; ".join(named + more))


def make_all(make: Callable[[Item], T], items: Iterable[Item], before: str) -> list[T]:
    """Return [make(item) for item in items].

    Raises:
        UserError: `make` refused some items; it names them by `before` and their positions.
    """
    made, mistakes = [], Mistakes()
    for position, item in enumerate(items):
        try:
            made.append(make(item))
        except UserError as error:
            mistakes.add(Place(before, position), error)
    mistakes.refuse()
    return made


def read_rows(source: str, split: str) -> Iterator[tuple[Place, object]]:
    """Yield (place, row) for each row. A row that cannot be parsed is a UserError instead. `load_examples` says what a
    source may be.

    Raises:
        UserError: the source cannot be read. It may be raised while iterating.
    """
    if source.startswith("tfds:"):
        return _guarded(source, _read_tfds(source.removeprefix("tfds:"), split))
    if source.startswith("hub:"):
        return _read_hub(source.removeprefix("hub:"), split)
    if path := _existing(source):
        return _guarded(source, _read_directory(path, split)) if path.is_dir() else _read_file(path)
    if source.endswith(FILE_SUFFIXES) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        raise UserError(f"{source}: no such file or directory (a Hub data set is written org/name or hub:name)")
    return _read_hub(source, split)


def _existing(source: str) -> epath.Path | None:
    """Return the file or directory; None if there is none."""
    scheme = source.partition("://")[0]
    try:
        path = epath.Path(source.removeprefix("file://")).expanduser()
        if path.exists():
            return path
        if "://" not in source:
            path.stat()  # raises PermissionError if the file is there but hidden from us
        return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except KeyError:
        raise UserError(f"{source}: {scheme}:// is not read; download the data and give its local path") from None
    except ImportError as error:
        needs = f"pip install {_STORES[scheme]}" if scheme in _STORES else str(error)
        raise UserError(f"{source}: reading {scheme}:// needs one package more: {needs}") from None
    except Exception as error:  # each store's client has its own
        raise UserError(f"{source} cannot be read: {_why(source, error)}") from error


def _guarded(what: object, rows: Iterator[tuple[Place, object]]) -> Iterator[tuple[Place, object]]:
    """Yield from `rows`, and turn any error while reading them into one line that names `what`.

    Only json, pyarrow, `datasets` and clients of stores run in here. Over damaged bytes they raise nearly anything:
    OSError, ArrowInvalid, UnicodeDecodeError, KeyError, AttributeError, MemoryError.
    """
    try:
        yield from rows
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be read: {_why(what, error)}") from error


def _why(what: object, error: Exception) -> str:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, PermissionError):
        return f"{said}: give your user the right to read it"
    if "://" in str(what):
        return f"{said}: look at your access to it and at the network, or download it and give its local path"
    return f"{said}: it is damaged or not whole; copy or download it again"


def _read_file(path: epath.Path) -> Iterator[tuple[Place, object]]:
    readers = {".json": _read_json, ".parquet": _read_parquet}
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        packed = " (is it packed? then unpack it)" if suffix in (".gz", ".zst", ".bz2", ".xz", ".zip") else ""
        raise UserError(f"{path}: cannot tell what this file is; name it {', '.join(FILE_SUFFIXES)}{packed}")
    return _guarded(path, readers.get(suffix, _read_json_lines)(path))


def _check_beginning(path: epath.Path) -> None:
    with path.open("rb") as file:
        beginning = file.read(64)
    start = beginning.removeprefix(codecs.BOM_UTF8).lstrip()
    for prefix, what in _NO_ROWS:
        if start.startswith(prefix):
            raise UserError(f"{path} is {what}")
    for prefix, suffix in _MISNAMED:
        if start.startswith(prefix) and path.suffix.lower() in (".jsonl", ".ndjson"):
            raise UserError(f"{path} is no file of one object a line: name it {suffix}")
    if not beginning and path.suffix.lower() in (".json", ".parquet"):  # no lines are no rows
        raise UserError(f"{path} is empty: copy or download it again")


def _read_json_lines(path: epath.Path) -> Iterator[tuple[Place, object]]:
    _check_beginning(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if line:
                yield Place(f"{path}:", number), _parsed(line)


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a ValueError: JSONDecodeError or UnicodeDecodeError
        return UserError(f"not valid JSON: {error}")


def _read_json(path: epath.Path) -> Iterator[tuple[Place, object]]:
    _check_beginning(path)
    rows = _parsed(path.read_bytes())  # it may begin with a byte-order mark
    if isinstance(rows, UserError):
        raise UserError(f"{path}: {rows} (one object a line? then name it .jsonl)")
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of rows, not {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield Place(f"{path} row ", index), row


def _read_parquet(path: epath.Path) -> Iterator[tuple[Place, object]]:
    import pyarrow
    import pyarrow.parquet

    _check_beginning(path)
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file: {_why(path, error)}") from None
        index = 0
        for batch in table.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                yield Place(f"{path} row ", index), row
                index += 1


def _read_directory(path: epath.Path, split: str) -> Iterator[tuple[Place, object]]:
    if is_saved_dataset(path):
        yield from _read_saved_dataset(path, split)
        return
    for part in files_of_split(path, split):
        yield from _guarded(part, _read_saved_dataset(part, split)) if part.is_dir() else _read_file(part)


def _read_saved_dataset(path: epath.Path, split: str) -> Iterator[tuple[Place, object]]:
    import datasets

    if (path / "dataset_dict.json").exists():  # read one split alone: the others may be damaged
        splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        if split not in splits:
            raise UserError(f"{path}: no split {split!r}; there are: {', '.join(splits)}")
        path = path / split
    yield from _rows_of(str(path), datasets.load_from_disk(str(path)))


def _rows_of(name: str, data) -> Iterator[tuple[Place, object]]:
    """Yield the rows of a `datasets.Dataset` as Arrow stores them, with JSON columns decoded.

    Do not decode images and sounds, which would need time and more packages: their rows are skipped anyway.
    """
    import datasets

    json_columns = datasets.Features({name: kind for name, kind in data.features.items() if "Json(" in repr(kind)})
    index = 0
    for table in data.with_format("arrow").iter(batch_size=4096):
        for row in table.to_pylist():
            decoded = json_columns.decode_example({column: row[column] for column in json_columns})
            yield Place(f"{name} row ", index), row | decoded
            index += 1


def _read_hub(name: str, split: str) -> Iterator[tuple[Place, object]]:
    import datasets

    repository, _, config = name.partition(":")
    if not repository:
        raise UserError(f"hub:{name}: names no data set; write hub:org/name, or hub:org/name:config")
    try:
        data = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # of `datasets`, of the Hub's client and of all that reads files for them
        raise UserError(f"{name}: the Hub gave no split {split!r}: {_hub_advice(error)}") from error
    return _guarded(name, _rows_of(name, data))


def _hub_advice(error: Exception) -> str:
    message = " ".join(str(error).split())
    if "gated" in message or "authenticated" in message:
        return "ask for access on its page, then run `hf auth login`"
    if isinstance(error, FileNotFoundError) and "offline" not in message.lower():
        return f"no such data set or local path ({message})"
    if isinstance(error, OSError):
        return "it cannot be reached from here; download the data set once and give its local path"
    return message


def _read_tfds(name: str, split: str) -> Iterator[tuple[Place, object]]:
    try:
        import tensorflow_datasets  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError:
        raise UserError("reading tfds:... needs TensorFlow Datasets: pip install 'spin_jax[tfds]'") from None
    try:
        data = tensorflow_datasets.data_source(name, split=split)
    # Raised for: no network or disk; a server that refuses; no such data set, configuration or split; data prepared
    # earlier in a format that cannot be read row by row.
    except (OSError, tensorflow_datasets.download.DownloadError, ValueError, NotImplementedError) as error:
        advice = str(error).partition("\n")[0]  # the lines after it list every data set there is
        raise UserError(f"tfds:{name}: cannot load split {split!r}: {advice}") from error
    for index in range(len(data)):
        yield Place(f"tfds:{name} row ", index), _plain(data[index])


def _plain(value: object) -> object:
    """Convert a TFDS value to what JSON would have: bytes to text, arrays to lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
