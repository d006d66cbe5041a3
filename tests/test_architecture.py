"""The floors of docs/architecture.md, held against the code: who may import whom, and what stays light."""

import ast
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "spin_jax"
HEAVY = ("jax", "flax", "orbax", "transformers", "datasets", "matplotlib", "torch")
LIGHT = (
    "config",
    "devices.accelerators",
    "runtime.metric_writer",
    "kernels",
    "data.layouts",
    "evaluation",
    "objectives",
    "reports.html",
    "reports.summary",
    "main",
    "generate",
    "evaluate",
    "mt_bench",
    "evaluation.judge",
    "report",
    "compile_check.__main__",
    "data.sources",
    "data.chat_format",
    "data.pairs",
)


def floors() -> dict[str, int]:
    """Package or module of the top level -> its floor in the document's table."""
    found = {}
    for floor, names in re.findall(r"^\| (\d+) \| ([^|]*) \|", (ROOT / "docs/architecture.md").read_text(), re.M):
        for name in re.findall(r"`(\w+)(?:\.py|/)`", names):
            assert name not in found, f"{name} is on two floors"
            found[name] = int(floor)
    return found


def imports(path: pathlib.Path) -> set[str]:
    """What of the top level of spin_jax a file imports, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "spin_jax":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spin_jax."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("spin_jax.")}
    return names


def test_every_package_has_a_floor():
    there = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert set(floors()) == there - {"__init__", "__pycache__"}


def test_packages_import_lower_floors_only():
    floor = floors()
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            above = [other for other in imports(path) - {name} if floor[other] >= floor[name]]
            wrong += [f"{path.relative_to(PACKAGE)} imports {other}" for other in above]
    assert not wrong


def test_light_modules_stay_light():
    """--help, a mistyped flag and reading data need no device, and no library that takes seconds to import."""
    code = "".join(f"import spin_jax.{module}\n" for module in LIGHT)
    code += "from spin_jax.config.__main__ import listing; listing()\n"  # asks all registries for their names
    code += f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stdout + run.stderr


def shape_letters() -> set[str]:
    """The letters of the document's table."""
    table = (ROOT / "docs/architecture.md").read_text().partition("## Shape letters")[2].partition("\n## ")[0]
    letters = re.findall(r"^\| ([A-Z]) \|", table, re.M)
    assert len(letters) == len(set(letters)), "a letter has two meanings"
    return set(letters)


def test_every_shape_suffix_is_in_the_table():
    unknown = {}
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        for name in names:
            suffix = re.fullmatch(r"_?[a-z]\w*_([A-Z0-9]*[A-Z][A-Z0-9]*)", name)
            if suffix and (letters := {letter for letter in suffix[1] if letter.isalpha()} - shape_letters()):
                unknown[f"{path.name}: {name}"] = letters
    assert not unknown
