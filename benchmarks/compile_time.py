"""How long a start waits for compilers: the programs of a config, compiled anew and taken from jax's cache on disk.

    python benchmarks/compile_time.py [--config=configs/zephyr_7b.py:h100-1,code] [--json=FILE]

Each program is lowered and compiled for the first device of this machine, by a process with an empty cache and by
another one after it, as `python -m spin_jax.main` does when it is started again. No array is made, so that a 7B model
needs no more memory than a small one.
"""

import argparse
import json
import pathlib
import runpy
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from contest import machine  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/zephyr_7b.py:h100-1,code", help="FILE[:ARG], for one device")
    parser.add_argument("--cache", help=argparse.SUPPRESS)  # of the processes that compile
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.cache:
        print(json.dumps(seconds(arguments.config, arguments.cache)))
        return
    print(f"machine: {machine()}")
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, f"--config={arguments.config}", f"--cache={cache}"]
        runs = [json.loads(subprocess.check_output(command, text=True).splitlines()[-1]) for _ in range(2)]
    for name, (lowering, compiling) in runs[0].items():
        again = sum(runs[1][name])
        print(f"{name:16} lowered {lowering:5.1f} s, compiled {compiling:5.1f} s; both with the cache {again:5.1f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(dict(zip(("anew", "cached"), runs, strict=True)), indent=1) + "\n")


def seconds(config_file: str, cache: str) -> dict[str, tuple[float, float]]:
    """Of each program: to lower it, and to compile it or to find it in `cache`."""
    import jax

    from spin_jax.compile_check import programs
    from spin_jax.compile_check.known_models import known
    from spin_jax.config import freeze, override

    jax.config.update("jax_compilation_cache_dir", cache)
    file, _, argument = config_file.partition(":")
    config = runpy.run_path(str(ROOT / file))["get_config"](*[argument] if argument else [])
    override(config, {"data.train": "not read"})
    config = freeze(config)
    found = {}
    for program in programs.make_programs(config, known(config.model.path), jax.devices()[:1]):
        start = time.perf_counter()
        lowered = program.jitted.lower(*program.args)
        between = time.perf_counter()
        lowered.compile()
        found[program.name] = (between - start, time.perf_counter() - between)
    return found


if __name__ == "__main__":
    main()
