"""What one GPU makes of all this, in one command and at most eight minutes, from a bare machine with jax[cuda12] or 13:

    python benchmarks/gpu.py [--peer_python=PATH] [--parts=train,attention] [--json=gpu.json]

    machine    card, driver, versions; always, and nothing else where it fails
    parity     the tests that need a GPU
    train      SPIN steps on packed rows of drawn lengths, random weights: 135M, 1.1B, and low-rank updates of 7B
    attention  its paths against each other, forward and backward
    sample     the sampler, tokens per second
    run        the quickstart from end to end, with one iteration
    peers      the steps of trl, and the samplers of transformers and vllm, as far as --peer_python has these

Each job of a part is a process with a time limit of its own. What fails or hangs leaves its last words in the JSON,
which is written anew after each job, and the others go on. `--size=tiny` tries all of it on a CPU, in a minute.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS = 480  # of all jobs together: what no time is left for is left out


@dataclasses.dataclass(frozen=True)
class Job:
    """A process of a part: a file of gpu_parts/, its arguments, and how many seconds it may take.

    `package`: what the peers' Python must have; "" for a job of our own. `alone`: it has the card itself, which is its
    contestant's otherwise.
    """

    file: str
    arguments: tuple[str, ...]
    seconds: float
    package: str = ""

    @property
    def alone(self) -> bool:
        return self.file not in ("train", "sample")


# In this order: what matters most comes first.
JOBS = {
    "machine": Job("machine", (), 30),
    "parity": Job("parity", (), 60),
    "train/135m": Job("train", ("135m", "spin_jax"), 75),
    "train/1b": Job("train", ("1b", "spin_jax"), 75),
    "train/7b": Job("train", ("7b", "spin_jax"), 90),
    "attention": Job("attention", (), 90),
    "sample": Job("sample", ("spin_jax",), 60),
    "peers/train/1b": Job("train", ("1b", "trl"), 60, "trl"),
    "peers/train/7b": Job("train", ("7b", "trl"), 75, "trl"),
    "peers/train/135m": Job("train", ("135m", "trl"), 60, "trl"),
    "run": Job("run", (), 90),
    "peers/sample/transformers": Job("sample", ("transformers",), 60, "transformers"),
    "peers/sample/vllm": Job("sample", ("vllm",), 120, "vllm"),
}
PARTS = list(dict.fromkeys(name.partition("/")[0] for name in JOBS))


def main() -> None:
    flags = parse_flags()
    report = {"size": flags.size, "platform": flags.platform, "jobs": {}}
    begin = time.monotonic()
    for name, job in JOBS.items():
        if not any(name == part or name.startswith(f"{part}/") for part in ["machine", *flags.parts]):
            continue
        left = flags.seconds - (time.monotonic() - begin)
        report["jobs"][name] = found = run(job, min(job.seconds * flags.patience, left), flags)
        report["seconds"] = round(time.monotonic() - begin, 1)
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name:26} {line(found)}", flush=True)
        if name == "machine" and "error" in found:
            sys.exit("nothing else is tried: a GPU is needed, or --size=tiny")
    print(f"{report['seconds']:.0f} s; all of it is in {flags.json}")


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("gpu.json"))
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, help="parts or jobs; none: all")
    parser.add_argument("--peer_python", default="", help="python with requirements-trl.txt, and whatever else it has")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--platform", help='of jax; "cuda,cpu", or with --size=tiny "cpu"')
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all jobs together")
    parser.add_argument("--patience", type=float, default=1.0, help="times each job's limit, on slow machines")
    flags = parser.parse_args()
    flags.platform = flags.platform or ("cpu" if flags.size == "tiny" else "cuda,cpu")
    if unknown := [part for part in flags.parts if not any(f"{name}/".startswith(f"{part}/") for name in JOBS)]:
        parser.error(f"no part is called {unknown[0]}: there are {', '.join(PARTS)}, and the jobs {', '.join(JOBS)}")
    return flags


def run(job: Job, seconds: float, flags: argparse.Namespace) -> dict:
    """What a job found, and `error` if it failed, was stopped or was left out."""
    if job.package and not has(flags.peer_python, job.package):
        return {"error": f"left out: --peer_python has no {job.package}"}
    if seconds <= 0:
        return {"error": f"left out: {flags.seconds:.0f} seconds are over"}
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory, "out.json")
        options = [f"--size={flags.size}", f"--platform={flags.platform}", f"--out={out}"]
        script = [sys.executable, ROOT / "benchmarks/gpu_parts" / f"{job.file}.py", *job.arguments, *options]
        begin = time.monotonic()
        platforms = {"JAX_PLATFORMS": flags.platform if job.alone else "cpu"}
        error = run_process([*script, f"--peer_python={flags.peer_python}"], seconds, directory, platforms)
        found = {"seconds": round(time.monotonic() - begin, 1)}
        if out.exists():
            found |= json.loads(out.read_text())
    return found | ({"error": error} if error else {})


def run_process(command: list, seconds: float, directory: str, environment: dict[str, str]) -> str | None:
    """Why a command failed: its last words; None if it did not. It and all that it has started are stopped in time."""
    options = {"cwd": directory, "env": os.environ | environment, "start_new_session": True}
    with pathlib.Path(directory, "log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **options)
        try:
            code, why = process.wait(seconds), ""
        except subprocess.TimeoutExpired:
            code, why = -1, f"stopped after {seconds:.0f} seconds\n"
        finally:
            stop_all(process)
        log.seek(0)
        return why + log.read()[-3000:].decode(errors="replace") if code else None


def stop_all(process: subprocess.Popen) -> None:
    """End what is left of the session that a process began."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def has(python: str, package: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return bool(python) and subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def line(found: dict) -> str:
    """A job's result as one line: its numbers, or why there are none."""
    facts = {k: v for k, v in found.items() if isinstance(v, (int, float, str)) and k not in ("seconds", "error")}
    words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()]
    if "error" in found:
        words.append(f"ERROR {(found['error'].strip().splitlines() or ['no words'])[-1]}")
    return f"{found.get('seconds', 0):5.0f} s  {', '.join(words)}"


if __name__ == "__main__":
    main()
