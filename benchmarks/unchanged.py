"""Prove that a refactoring changed nothing: write down what the code computes, before and after, and compare.

    python benchmarks/unchanged.py programs DIRECTORY     the lowered programs of three configs
    python benchmarks/unchanged.py check DIRECTORY        the compile check's report of one of them
    python benchmarks/unchanged.py runs DIRECTORY         weights, responses and metrics of six tiny runs
    python benchmarks/unchanged.py compare BEFORE AFTER   name every difference; exit status 1 if there is one,
                                                          or nothing that both have
    python benchmarks/unchanged.py golden DIRECTORY       programs.json of the quickstart, which a test keeps

Write BEFORE with the code of an earlier commit (git worktree add ../before COMMIT) and AFTER with the code at hand, on
the same machine and the same version of jax. tests/compile_check/test_golden_programs.py holds the quickstart's
programs to tests/golden/programs.json.
"""

import base64
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Config, slice, layers (0: its own number). Seven billion params in two layers have all the programs of a deep model.
PROGRAMS = (
    ("configs/quickstart.py", "cpu", 0),
    ("configs/smollm2_135m.py", "v5e-8", 0),
    ("configs/zephyr_7b.py:v5e-16", "v5e-16", 2),
)
CHECKED = "configs/zephyr_7b.py:v5e-16"
TINY = (
    "--config.iterations=2",
    "--config.toy.train_rows=128",
    "--config.toy.eval_prompts=32",
    "--config.data.eval_rows=16",
    "--config.sft.epochs=2",
    "--config.train.batch_size=16",
)
RUNS = {
    "float32": (),
    "bfloat16": ("--config.model.compute_dtype=bfloat16",),
    "live": ("--config.spin.opponent=live", "--config.sft.control=False"),
    "responses": ("--config.generate.responses=2", "--config.spin.loss=hinge", "--config.generate.top_p=0.9"),
    "low rank": (
        "--config.model.path={directory}/float32/sft/model",
        "--config.data.train={directory}/float32/toy/train.jsonl",
        "--config.sft.epochs=0",
        "--config.sft.control=False",
        "--config.lora.rank=4",
    ),
    "processes": (),
}
TIMES = ("seconds", "tokens_per_second", "model_tflops_per_second", "time")


def main(command: str, *directories: str) -> int:
    if command == "compare":
        return compare(*map(pathlib.Path, directories))
    directory = pathlib.Path(directories[0])
    directory.mkdir(parents=True, exist_ok=True)
    found = {"programs": programs, "check": check, "runs": runs, "golden": golden}[command](directory)
    name = {"golden": "programs"}.get(command, command)
    (directory / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def programs(directory: pathlib.Path) -> dict[str, object]:
    """The hash of each lowered program, whose text is written beside it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    found: dict[str, object] = {}
    for config, name, layers in PROGRAMS:
        for program, text in lowered(config, name, layers).items():
            label = f"{pathlib.Path(config).name.partition('.')[0]}: {program}"
            (directory / f"{label.replace(': ', '-').replace(' ', '_')}.mlir").write_text(text)
            found[label] = hashlib.sha256(text.encode()).hexdigest()
    return found


def golden(directory: pathlib.Path | None = None) -> dict[str, str]:
    """The hashes of the quickstart's programs, and the jax that they were lowered by."""
    import jax

    texts = lowered(*PROGRAMS[0])
    return {"jax": jax.__version__} | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def check(directory: pathlib.Path) -> dict[str, object]:
    """The compile check's report of each program."""
    file = directory / "compile_check.json"
    command = [sys.executable, "-m", "spin_jax.compile_check", f"--config={CHECKED}", "--layers=2", f"--json={file}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return {report["program"]: report for report in json.loads(file.read_text())["programs"]}


def lowered(config: str, name: str, layers: int = 0) -> dict[str, str]:
    """The StableHLO text of each program of a config on a slice, without names."""
    import dataclasses

    from spin_jax.compile_check import compiler, known_models
    from spin_jax.compile_check.programs import make_programs
    from spin_jax.config import freeze
    from spin_jax.devices.accelerators import find_slice
    from spin_jax.runtime import cli
    from spin_jax.tasks import toy

    settings = cli.load_config(str(ROOT / config))
    settings.data.train = settings.data.train or "not read"
    settings = freeze(settings)
    if settings.model.path == "toy:":
        model = toy.model_config(settings.toy)
    else:
        model = known_models.describe(settings.model.path)
    if layers:
        model = dataclasses.replace(model, num_layers=layers)
    made = make_programs(settings, model, compiler.devices_of(find_slice(name)))
    return {one.name: without_names(one.jitted.lower(*one.args).as_text()) for one in made}


def without_names(text: str) -> str:
    """Functions by the order in which they are met, results without the names of the fields that hold them; the rest of
    the text is the program. A Pallas kernel is in it as bytes, with the lines of its source file: it is written out
    without them."""
    text = re.sub(r'jax\.result_info = "[^"]*"(?:, )?', "", text)
    text = re.sub(
        r"(custom_call_config\\22: {\\22body\\22: \\22)([\w+/=]+)", lambda body: body[1] + _kernel(body[2]), text
    )
    order: dict[str, str] = {}
    return re.sub(r'@[\w.]+|@"[^"]*"', lambda name: order.setdefault(name[0], f"@{len(order)}"), text)


def _kernel(body: str) -> str:
    from jax._src.lib import tpu  # no public name
    from jaxlib.mlir import ir

    with ir.Context() as context:
        tpu.register_dialect(context)
        context.allow_unregistered_dialects = True
        return ir.Module.parse(base64.b64decode(body)).operation.get_asm(enable_debug_info=False)


def runs(directory: pathlib.Path) -> dict[str, object]:
    """Weights as hashes, responses, metrics and the summary of each run."""
    found = {}
    for name, flags in RUNS.items():
        workdir = directory / name.replace(" ", "_")
        command = [sys.executable, "-m", "spin_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}"]
        commands = [[*command, *TINY, *(flag.format(directory=directory) for flag in flags)]]
        devices = 1
        if name == "processes":
            devices, port = 2, 9471
            several = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
            commands = [[*commands[0], *several, f"--process_id={i}"] for i in range(2)]
        variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        started = [subprocess.Popen(one, cwd=ROOT, env=os.environ | variables) for one in commands]
        if any(process.wait() for process in started):
            raise SystemExit(f"{name}: {' '.join(commands[0])} failed")
        found |= {f"{name}: {what}": value for what, value in contents(workdir).items()}
    return found


def contents(workdir: pathlib.Path) -> dict[str, object]:
    """What a run has made, by file."""
    import pyarrow.parquet

    found: dict[str, object] = {}
    for file in sorted(workdir.rglob("*")):
        label = str(file.relative_to(workdir))
        if file.suffix == ".safetensors":
            found[label] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.suffix == ".parquet":
            found[label] = pyarrow.parquet.read_table(file).to_pylist()
        elif file.name == "metrics.jsonl":
            rows = map(json.loads, file.read_text().splitlines())
            found[label] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        elif file.name in ("result.json", "summary.json"):
            found[label] = json.loads(file.read_text())
    return found


def compare(before: pathlib.Path, after: pathlib.Path) -> int:
    """Print what differs."""
    differ = compared = 0
    for name in ("programs.json", "check.json", "runs.json"):
        if not ((before / name).exists() and (after / name).exists()):
            print(f"{name}: not in both")
            continue
        compared += 1
        old, new = (json.loads((directory / name).read_text()) for directory in (before, after))
        for key in old | new:
            if old.get(key) != new.get(key):
                differ += 1
                print(f"{key}: {_difference(old.get(key), new.get(key))}")
    print(f"{differ} differences in {compared} files")
    return bool(differ or not compared)


def _difference(old: object, new: object) -> str:
    if old is None or new is None:
        return "only " + ("after" if old is None else "before")
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{len(old)} rows before, {len(new)} after"
        row = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return f"row {row}: {_difference(old[row], new[row])}"
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(
            f"{key}: {old.get(key)} -> {new.get(key)}" for key in old | new if old.get(key) != new.get(key)
        )
    return f"{old} -> {new}"[:300]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
