"""Find the files of a directory that hold the rows of a split, by the Hub's conventions for names and folders."""

import collections
import logging
import re
from collections.abc import Iterable

from etils import epath

from spin_jax.errors import UserError

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")

# Words that name a split, as the Hub has them.
_SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_SHARD = re.compile(r"-(\d+)-of-(\d+).*$")  # train_sft-00000-of-00003.parquet is one shard of train_sft
_NUMBER = re.compile(r"[-_. ]?\d+$")
_BACKUP = re.compile(r"(?i)([-_. ]+(bak|backup|copy|old|orig|tmp)[-_. ]?\d*| ?\(\d+\))$")
_NOT_ROWS = ("metadata", "dataset_info", "dataset_infos", "dataset_dict", "state")  # stems of what describes the rows
_LIST_OF_ROWS = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*[{\]]")

_LOG = logging.getLogger(__name__)


def is_saved_dataset(path: epath.Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the directory."""
    state = path / "state.json"  # many programs write a file of this name
    if state.exists() and (b"_data_files" in state.read_bytes() or any(path.glob("data-*.arrow"))):
        return True
    return (path / "dataset_dict.json").exists()


def files_of_split(path: epath.Path, split: str) -> list[epath.Path]:
    """Return the files of a split, or the folders that `Dataset.save_to_disk` wrote.

    They lie in the directory, in its `data/`, or in a folder in either that is named like the split. If no name tells a
    split, all files are the split "train".

    Raises:
        UserError: the split has no file, or is there more than once.
    """
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    named = [(_SHARD.sub("", file.stem), file) for folder in folders for file in _files(folder)]
    for inner in [inner for folder in folders for inner in _visible(folder) if inner.is_dir()]:
        if _says(inner.name, split) or _says_any_split(inner.name):
            named += [(inner.name, file) for file in ([inner] if is_saved_dataset(inner) else _files(inner))]
    chosen = _choose(named, split)
    if not chosen:
        kinds, there = "/".join(FILE_SUFFIXES), _what_is_there(path, folders, {name for name, _ in named})
        raise UserError(f"{path}: no {kinds} file of split {split!r}; {there}")
    _check_alone(path, split, chosen)
    files = [file for _, file in chosen]
    _LOG.info("%s: reading %s", path, _listed(path, files))
    return files


def _choose(named: list[tuple[str, epath.Path]], split: str) -> list[tuple[str, epath.Path]]:
    """Return the (name, file) of a split: the name is the split's, or that with a number after it, or is the only one
    that has the split as a word."""
    stems = [_NUMBER.sub("", name) for name, _ in named]
    variants = {stem for stem in stems if _says(stem, split)}
    for names in ([name for name, _ in named], stems):
        if split in names:
            return [part for name, part in zip(names, named, strict=True) if name == split]
    if len(variants) == 1:  # train_small.jsonl alone is the train split; train_sft with train_gen is not
        return [part for stem, part in zip(stems, named, strict=True) if stem in variants]
    if split == "train" and not any(_says_any_split(name) for name, _ in named):
        return [(name, file) for name, file in named if _may_hold_rows(file)] or named
    return []


def _says(name: str, split: str) -> bool:
    words = _SPLITS.get(split, re.escape(split))
    return bool(re.search(rf"(?<![a-z])({words})(?![a-z])", name, re.IGNORECASE))


def _says_any_split(name: str) -> bool:
    return any(_says(name, split) for split in _SPLITS)


def _visible(folder: epath.Path) -> list[epath.Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))


def _files(folder: epath.Path) -> list[epath.Path]:
    """Return the files that may hold rows, without backups of another file."""
    files = [file for file in _visible(folder) if file.suffix.lower() in FILE_SUFFIXES and not file.is_dir()]
    names = {file.name for file in files}
    originals = {file: _BACKUP.sub("", file.stem) + file.suffix for file in files}
    return [file for file in files if file.stem not in _NOT_ROWS and originals[file] not in names - {file.name}]


def _may_hold_rows(file: epath.Path) -> bool:
    """Whether a JSON file begins like a list of rows. Other files are True: only reading them would tell."""
    if file.suffix.lower() != ".json":
        return True
    with file.open("rb") as content:
        return bool(_LIST_OF_ROWS.match(content.read(4096)))


def _check_alone(path: epath.Path, split: str, chosen: list[tuple[str, epath.Path]]) -> None:
    """Refuse a split that is there twice, and warn of missing shards."""
    by_name = collections.defaultdict(list)
    for name, file in chosen:
        shard = _SHARD.search(file.stem)
        number, count = shard.groups() if shard else ("", "")
        by_name[name].append((file, (file.parent, file.suffix, count), number))
    for name, files in by_name.items():
        count, numbers = files[0][1][2], [number for _, _, number in files if number]
        if len({kind for _, kind, _ in files}) > 1 or len(set(numbers)) < len(numbers):
            twice = _listed(path, [file for file, _, _ in files])
            raise UserError(f"{path}: split {split!r} is there more than once ({twice}): name the one to read")
        if len(numbers) < int(count or 0):
            _LOG.warning("%s: only %d of the %d shards of %s are there", path, len(numbers), int(count), name)


def _listed(path: epath.Path, files: Iterable[epath.Path]) -> str:
    return ", ".join(str(file.relative_to(path)) for file in files)


def _what_is_there(path: epath.Path, folders: list[epath.Path], splits: set[str]) -> str:
    files = [file for folder in folders for file in _visible(folder) if not file.is_dir()]
    inner = [folder.name for folder in _visible(path) if folder.is_dir() and folder.name != "data"]
    there = f"files there: {_listed(path, files) or 'none'}"
    if splits:
        return f"{there}; --config.data.split takes {' or '.join(sorted(splits))}"
    return f"{there}; folders there: {', '.join(inner)}: name one, as {path / inner[0]}" if inner else there
