"""Job of gpu.py: a run from end to end, the quickstart with one iteration and less data."""

import json
import subprocess
import sys

import job

CHANGES = {
    "full": ("iterations=1", "sft.control=False"),
    "tiny": ("iterations=1", "sft.control=False", "sft.epochs=1.0", "train.epochs=1.0", "toy.train_rows=128")
    + ("train.batch_size=16", "toy.eval_prompts=16", "data.eval_rows=16", "toy.hidden_size=32", "toy.num_layers=1"),
}


def main() -> None:
    flags = job.parse_flags()
    workdir = flags.out.parent / "run"
    command = [sys.executable, "-m", "spin_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    changes = [f"--config.{change}" for change in CHANGES[flags.size]]
    if code := subprocess.run([*command, *changes], cwd=job.ROOT).returncode:
        sys.exit(code)
    results = sorted(workdir.rglob("result.json"))
    job.write(flags, {"results": {str(path.relative_to(workdir)): json.loads(path.read_text()) for path in results}})


if __name__ == "__main__":
    main()
