"""Rows and files of data for the tests of spin_jax/data/."""

import json
import pathlib

from spin_jax.data.sources import Example, load_examples

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "7"},
]


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write_lines(path: pathlib.Path, rows: list) -> str:
    """`rows`, one a line; those that are text as they stand."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def write_parquet(path: pathlib.Path, rows: list[dict]) -> str:
    """`rows` in the columns of all of them: what one lacks is null."""
    import pyarrow
    import pyarrow.parquet

    columns = dict.fromkeys(column for row in rows for column in row)
    table = pyarrow.table({column: [row.get(column) for row in rows] for column in columns})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def read(directory: pathlib.Path, rows: list, **options: str) -> list[Example]:
    """The examples of `rows` in a file of lines."""
    return load_examples(write_lines(directory / "rows.jsonl", rows), **options).examples
