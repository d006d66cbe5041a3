"""What the benchmarks that compare programs share: contestants in processes of their own, and what the machine is."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Worker:
    """A contestant's process: a file of contestants/, which speaks as contestants/parent.py says.

    Args:
        contestant: the file's name, and options that are added to `settings`. With `huge_pages` the process asks Linux
            for pages of 2 MiB in the place of 4 KiB wherever it allocates that much.
        arguments: the benchmark's `peer_python` and `threads`, and on which `platform` jax is to run (none: a CPU).

    Attributes:
        versions: of the libraries that it runs on.
        first: what it answered to the steps of its first pass.
    """

    def __init__(self, name: str, contestant: tuple[str, dict], settings: dict, arguments: argparse.Namespace):
        file, options = contestant
        python = sys.executable if name.startswith("spin_jax/") else arguments.peer_python
        environment = os.environ | {
            "OMP_NUM_THREADS": str(arguments.threads),
            "JAX_PLATFORMS": getattr(arguments, "platform", "cpu"),
            "XLA_FLAGS": "",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(options.get('huge_pages', False))}",
        }
        self.name = name
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, ROOT / "benchmarks/contestants" / f"{file}.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.versions = self._ask(json.dumps(settings | options))

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        if exception[0]:
            self._process.kill()
        self._process.wait()

    def first_pass(self, steps: int) -> None:
        """Whatever is compiled is compiled then."""
        self.first = [self.step() for _ in range(steps)]

    def step(self) -> dict:
        """The answer (see contestants/parent.py), with `others`: the mean number of cores that others kept busy."""
        busy, start = busy_seconds(), time.perf_counter()
        answer = self._ask("")
        elapsed = time.perf_counter() - start
        answer["others"] = max(0.0, (busy_seconds() - busy - answer["cpu_seconds"]) / elapsed)
        return answer

    def _ask(self, line: str) -> dict:
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._log.seek(0)
            sys.exit(f"{self._log.read()}\n{self.name} ended: its last words are above")
        return json.loads(answer)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def busy_seconds() -> float:
    """CPU time that all processes of the machine have used."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, open("/proc/stat").readline().split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = f"{os.cpu_count()} cores, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f}"
    return f"{names[0] if names else platform.machine()}, {facts}"


def is_runnable(name: str, peer_python: str | None) -> bool:
    """Whether there is a Python to run a contestant with; says so if not."""
    if not name.startswith("spin_jax/") and not peer_python:
        print(f"{name}: left out, --peer_python is not given")
        return False
    return True
