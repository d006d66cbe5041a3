"""The table of docs/architecture.md, held against the code: who may import whom, and what stays light."""

import ast
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "spin_jax"
HEAVY = ("jax", "flax", "orbax", "transformers", "datasets", "matplotlib", "torch")
LIGHT = ("config", "slices", "metrics", "report", "main", "generate", "data.sources", "data.chat", "data.pairs")


def rooms() -> dict[str, int]:
    """Module or package -> its row in the document's table."""
    found = {}
    for row, modules in re.findall(r"^\| (\d+) \| ([^|]*) \|", (ROOT / "docs/architecture.md").read_text(), re.M):
        for name in re.findall(r"`spin_jax/(\w+)(?:\.py|/)`", modules):
            assert name not in found, f"{name} is in two rows"
            found[name] = int(row)
    return found


def imports(path: pathlib.Path) -> set[str]:
    """Top-level parts of spin_jax that a file imports, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "spin_jax":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("spin_jax."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("spin_jax.")}
    return names


def test_every_module_has_a_room():
    modules = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert set(rooms()) == modules - {"__init__", "__pycache__"}


def test_upper_rooms_import_lower_ones():
    row = rooms()
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            wrong += [f"{path.name} imports {other}" for other in imports(path) - {name} if row[other] >= row[name]]
    assert not wrong


def test_light_modules_stay_light():
    """--help, a mistyped flag and reading data need no device, and no library that takes seconds to import."""
    code = "".join(f"import spin_jax.{module}\n" for module in LIGHT)
    code += f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stdout + run.stderr
