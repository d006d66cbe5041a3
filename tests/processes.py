"""Real processes that work together, as several hosts do: each with its own virtual CPU devices."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Ended(NamedTuple):
    """How a process ended: its exit status (minus the signal that killed it), and stdout and stderr together."""

    status: int
    output: str


def run_command(arguments: Sequence[str], processes: int = 1, first: Mapping[int, str] | None = None, **settings):
    """The command on `processes` hosts; `first` has code that process i runs in front of it. See `run_together`."""
    codes = [f"{(first or {}).get(i, '')}\nfrom spin_jax import main\nmain.run()" for i in range(processes)]
    flags = [[]]
    if processes > 1:
        address = f"127.0.0.1:{free_port()}"
        flags = [
            [f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={i}"] for i in range(processes)
        ]
    return run_together([["-c", code, *arguments, *own] for code, own in zip(codes, flags, strict=True)], **settings)


def run_together(
    commands: Sequence[Sequence[str]],
    *,
    devices: int,
    cache: pathlib.Path | None = None,
    directories: Sequence[pathlib.Path] | None = None,
    timeout: float = 300,
) -> list[Ended]:
    """Start python with each of `commands` at once, and wait for all.

    Args:
        commands: what follows `python`.
        devices: of each process.
        cache: where compiled programs are kept.
        directories: where each process is started; the repository if not given.
        timeout: seconds; past it all are killed.
    """
    variables = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    if cache:
        variables |= {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    started = []
    for i, command in enumerate(commands):
        output = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop its process, and so the others
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=directories[i] if directories else ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        started.append((process, output))
    deadline = time.monotonic() + timeout
    ended = []
    try:
        for process, output in started:
            process.wait(max(0.0, deadline - time.monotonic()))
            output.seek(0)
            ended.append(Ended(process.returncode, output.read()))
    finally:
        for process, output in started:
            process.kill()
            process.wait()
            output.close()
    return ended


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
