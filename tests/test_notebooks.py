"""Every notebook is run from its first cell to its last, and its outputs hold what its text promises."""

import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """notebook's name -> its outputs as (all printed text, all HTML that it shows), run in an empty directory."""
    # The notebook's own process finds this checkout, and one device as on a laptop.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setenv("XLA_FLAGS", "")

    def run(name: str) -> tuple[str, str]:
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
        return printed, "".join(output.get("data", {}).get("text/html", "") for output in outputs)

    return run


def test_spin_quickstart(execute, tmp_path):
    printed, shown = execute("spin_quickstart.ipynb")
    assert shown.count("&lt;svg") > 10, "the report with its curves"
    assert "Collecting" not in printed, "nothing is installed where spin_jax is importable"
    rows = re.findall(r"^(untrained|SFT|iteration \d) +(\S+) +(\S+)$", printed, re.M)
    validity = {name: float(value) for name, value, _ in rows}
    kl_to_data = {name: float(value) for name, _, value in rows}
    assert set(validity) == {"untrained", "SFT", "iteration 0", "iteration 1"}
    # SFT learns the task from next to nothing, and self-play keeps what it learned.
    assert validity["untrained"] < 0.05 < 0.2 < validity["SFT"]
    for name in ("iteration 0", "iteration 1"):
        assert validity[name] > 0.9 * validity["SFT"]
        assert kl_to_data[name] < 1.1 * kl_to_data["SFT"]
        assert validity[name] != validity["SFT"]
    assert "the same after reloading: True" in printed
    assert (tmp_path / "my-spin-model" / "config.json").exists()


def test_notebooks_are_clean():
    """Committed without outputs, so that a change of a notebook is a change of its code or text."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path.name
