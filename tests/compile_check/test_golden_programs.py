"""The quickstart's programs are those that they were: a refactoring changes none of them without saying so."""

import importlib
import json
import pathlib

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "programs.json").read_text())


@pytest.mark.skipif(jax.__version__ != GOLDEN["jax"], reason=f"lowered by jax {GOLDEN['jax']}, each jax in its own way")
def test_the_quickstarts_programs_are_unchanged(monkeypatch):
    """Where a change is wanted: python benchmarks/unchanged.py golden tests/golden, and name it in the commit."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    unchanged = importlib.import_module("unchanged")
    assert unchanged.golden() == GOLDEN
