"""The fenced blocks of a document, and the files that it shows."""

import pathlib
import re


def blocks(document: pathlib.Path, language: str) -> list[tuple[int, str]]:
    """(number of its first line, text) of each fenced block of a language."""
    text = document.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, match.start()) + 2, match[1]) for match in found]


def files(document: pathlib.Path) -> dict[str, str]:
    """Name -> content of each file that a document shows: a block of Python whose first line is `# NAME.py`."""
    shown = (re.match(r"# (\w+\.py)\n", text) for _, text in blocks(document, "python"))
    return {name[1]: name.string for name in shown if name}
