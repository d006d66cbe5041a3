"""What the documents say is true: snippets run, commands parse, names and links exist."""

import ast
import json
import math
import pathlib
import pkgutil
import re
import shlex
import string
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from absl.testing import flagsaver
from documents import blocks, files

import spin_jax
from spin_jax import config as config_lib
from spin_jax import evaluate, generate, main, mt_bench, report  # noqa: F401  (main and report define flags)
from spin_jax.compile_check import __main__
from spin_jax.data.layouts import LAYOUTS
from spin_jax.data.sources import load_examples
from spin_jax.errors import UserError
from spin_jax.runtime import cli as command_lib
from spin_jax.tasks import toy

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
# Commands whose effect lies outside of this project: known, and not run here.
KNOWN_COMMANDS = ("lm_eval", "python3", "pip", "pytest", "git", "cd", "source", "tensorboard", "jupyter", "export")
CLOUD_COMMANDS = ("gcloud", "kubectl", "docker", "xpk", "sky", "ssh-add", "launch/worker.sh")
FOLDERS = "spin_jax|configs|tests|docs|benchmarks|notebooks|launch"
FILE_SUFFIXES = ("py", "md", "json", "jsonl", "npz", "txt", "parquet", "model")
FIELDS = config_lib.flatten(config_lib.base_config())
# By their last names, as documents call them.
MODULES = {"spin_jax": "spin_jax"} | {
    module.name.rpartition(".")[2]: module.name for module in pkgutil.walk_packages(spin_jax.__path__, "spin_jax.")
}
SECTIONS = {field.partition(".")[0] for field in FIELDS if "." in field}

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def commands() -> list[tuple[str, str]]:
    """(where, command) of every line of every bash block; a backslash joins a line to the next."""
    found = []
    for document in DOCUMENTS:
        for first, text in blocks(document, "bash"):
            for line in text.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found += [(f"{document.name}:{first}", part.strip()) for part in line.split("&&")]
    return found


def launched_commands() -> list[tuple[str, str]]:
    """(where, command) of what the examples under launch/ run."""
    jobset, sky = (yaml.safe_load((ROOT / "launch" / name).read_text()) for name in ("jobset.yaml", "sky.yaml"))
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    run = string.Template(sky["run"]).substitute(sky["envs"])
    return [("jobset.yaml", shlex.join(container["command"])), ("sky.yaml", run.removeprefix(".venv/bin/"))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, str]:
    """(a tiny model's directory, its data)."""
    settings = config_lib.ToyConfig(train_rows=16, eval_prompts=1, hidden_size=16, num_layers=1)
    return toy.prepare(tmp_path_factory.mktemp("tiny"), settings, seed=0)


@pytest.fixture
def snippets(tiny, tmp_path, monkeypatch):
    """document -> the names that its python blocks define, run in order where the files they speak of exist."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("my-sft-model").symlink_to(tiny[0])
    pathlib.Path("my-data.jsonl").symlink_to(tiny[1])

    def run(document: pathlib.Path) -> dict:
        names: dict = {"__name__": "__main__"}
        for line, code in blocks(document, "python"):
            # Blank lines in front, so that a traceback names the document's own line.
            exec(compile("\n" * (line - 1) + code, str(document), "exec"), names)
        return names

    return run


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if blocks(path, "python") and path.name not in ("python.md", "extending.md")],
    ids=lambda path: path.name,
)
def test_python_blocks_run(document, snippets):
    snippets(document)


def test_python_md(snippets):
    """It runs, and does what it says: the saved model is the trained one, and an iteration starts at log 2."""
    document = ROOT / "docs/python.md"
    names = snippets(document)
    reloaded = names["spin_jax"].load("my-spin-model")
    for before, after, again in zip(
        *(jax.tree.leaves(m.params) for m in (names["model"], names["better"], reloaded)), strict=True
    ):
        np.testing.assert_array_equal(after, again)
        assert (before != after).any()
    assert pathlib.Path("runs/first/iteration_0/metrics.jsonl").exists()
    assert names["metrics"]["rewards/margin"] > 0  # after a step with a learning rate
    params = names["model"].params
    _, metrics, _ = names["step"](names["init_state"](params, names["optimizer"]), params, names["batch"])
    assert float(metrics["loss"]) == pytest.approx(math.log(2), abs=1e-6)


def test_jsonl_blocks_are_rows(tmp_path):
    """Each line of a jsonl block is data that a run accepts; together they show every layout."""
    layouts = set()
    for document in DOCUMENTS:
        for _, text in blocks(document, "jsonl"):
            for line in text.splitlines():
                path = tmp_path / "row.jsonl"
                path.write_text(line + "\n")
                assert reads_as(path, "auto") or reads_as(path, "preference")  # which must be asked for
                layouts |= {name for name in LAYOUTS if reads_as(path, name)}
    assert layouts == set(LAYOUTS)


def reads_as(path: pathlib.Path, layout: str) -> bool:
    try:
        return bool(load_examples(str(path), layout=layout).examples)
    except UserError:
        return False


def checked_config():
    return __main__.config_and_slice()[0]


@pytest.mark.parametrize(("where", "command"), commands() + launched_commands())
def test_bash_blocks(where, command, monkeypatch, tmp_path, own_registries):
    """Our own commands are parsed with the real flags and their config is validated; others are known ones."""
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists(), f"{where}: {command}"
    elif words[0] == "launch/tpu.sh":
        ran = subprocess.run([ROOT / words[0], words[1], "--dry-run", *words[2:]], capture_output=True, text=True)
        assert ran.returncode == 0, f"{where}: {ran.stderr}"
    elif words[:2] != ["python", "-m"]:
        assert words[0] in KNOWN_COMMANDS + CLOUD_COMMANDS, f"{where}: {command}"
    elif words[2].startswith("spin_jax"):
        programs = ("main", "generate", "evaluate", "mt_bench", "report", "compile_check")
        assert words[2].removeprefix("spin_jax.") in programs, f"{where}: {command}"
        if words[3:] == ["--help"]:
            return
        if words[2] == "spin_jax.report":
            with flagsaver.flagsaver():
                assert all("/" in workdir for workdir in command_lib.parse_flags(words[2:], words=True)[1:])
            return
        monkeypatch.chdir(ROOT)
        for name, content in files(ROOT / "docs/extending.md").items() if where.startswith("extending") else ():
            monkeypatch.chdir(tmp_path)
            pathlib.Path(name).write_text(content)
        with flagsaver.flagsaver():
            assert command_lib.parse_flags(words[2:]) == words[2:3], "every word but the first is a flag"
            configs = {
                "main": command_lib.config,
                "generate": generate.sampling_config,
                "evaluate": evaluate.evaluation_config,
                "mt_bench": mt_bench.bench_config,
                "compile_check": checked_config,
            }
            config_lib.freeze(configs[words[2].removeprefix("spin_jax.")]())
    else:
        assert words[2] in ("venv", "pip", "pytest", "http.server"), f"{where}: {command}"


@every_document
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@every_document
def test_files_exist(document):
    text = document.read_text()
    for path in re.findall(rf"\b(?:{FOLDERS})/[\w/.-]*\.(?:py|md|ipynb|sh|yaml)\b", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`(spin_jax/[\w/]*/)`", text):
        assert (ROOT / path).is_dir(), path


@every_document
def test_config_fields_exist(document):
    known = set(FIELDS) | SECTIONS | set(dir(config_lib))
    for name in re.findall(r"\bconfig\.((?:[a-z_]+\.)*[a-z_]+)\b(?!\.?[\w/])", document.read_text()):
        assert name in known or name in ("json", "py", "section.field"), f"config.{name}"


@every_document
def test_code_names_exist(document):
    """`module.name` in backticks is in spin_jax, `test_name` in tests/."""
    text = document.read_text()
    for dotted in re.findall(r"`(\w+(?:\.\w+)+)`", text):
        module, _, name = dotted.partition(".")
        if module in MODULES and module not in SECTIONS | {"config"} and name not in FILE_SUFFIXES:
            pkgutil.resolve_name(f"{MODULES[module]}.{name}")
    tests = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    } | {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for name in re.findall(r"`(test_\w+)`", text):
        assert name in tests, name


def test_notebooks_are_json():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert json.loads(path.read_text())["nbformat"] == 4


def test_the_readmes_first_command_runs(tmp_path):
    """Word for word but for a size that a test can wait for; it prints the columns that the README shows."""
    (command,) = [
        text for where, text in commands() if where.startswith("README") and "--workdir=runs/quickstart" in text
    ]
    arguments = shlex.split(command)[1:]
    small = ["iterations=1", "sft.epochs=1", "toy.train_rows=384", "toy.eval_prompts=4"]
    ran = subprocess.run(
        [sys.executable, *arguments, f"--workdir={tmp_path}", *(f"--config.{change}" for change in small)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    shown = re.search(r"^model +iteration +validity +kl_to_data$", (ROOT / "README.md").read_text(), re.M)
    assert shown and all(column in ran.stdout for column in shown[0].split())
    assert all(model in ran.stdout for model in ("SFT", "iteration 0", "SFT control 0"))
    assert (tmp_path / "iteration_0" / "model" / "model.safetensors").exists()
