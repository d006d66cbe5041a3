"""This project's sampler as a contestant of sampling.py.

Options: `batch_size` (slots), and `static`: prompts in batches of that size, each to its slowest response, where slots
are refilled otherwise; and, where it is given, `compute_dtype`.
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxlib  # noqa: E402
from parent import Parent  # noqa: E402
from spin_jax_step import load  # noqa: E402

from spin_jax import checkpoints
from spin_jax.config import GenerateConfig  # noqa: E402
from spin_jax.devices import sharding  # noqa: E402
from spin_jax.generation.engine import Engine, Progress  # noqa: E402
from spin_jax.models import Execution  # noqa: E402


def main() -> None:
    parent = Parent()
    s = parent.settings
    prefill = s["batch_size"] if s["static"] else min(16, s["batch_size"])
    settings = GenerateConfig(
        max_new_tokens=s["max_new_tokens"], batch_size=s["batch_size"], prefill_batch_size=prefill
    )
    if s["static"]:
        settings = dataclasses.replace(settings, tail_batch_size=s["batch_size"])
    mesh = sharding.one_device_mesh()
    execution = Execution(jnp.dtype(s.get("compute_dtype", "float32")), mesh=mesh)
    model = checkpoints.read_config(s["model"])
    params, _ = load(pathlib.Path(s["model"]), model, execution, cast=execution.dtype != jnp.float32)
    engine = Engine(model, settings, execution, tuple(s["stop_ids"]))
    params = engine.lay_out(params)
    prompts = sorted(enumerate(s["prompts"]), key=lambda prompt: -len(prompt[1]))
    size = s["batch_size"] if s["static"] else len(prompts)
    parent.ready(jax=jax.__version__, jaxlib=jaxlib.__version__)
    seed = 0
    while True:
        parent.wait()
        lengths, calls = {}, []
        for i in range(0, len(prompts), size):
            calls.append(Progress())
            drawn = engine.generate(params, dict(prompts[i : i + size]), seed=seed, progress=calls[-1])
            lengths |= {one.row: len(one.tokens) for one in drawn}
        busy, capacity, steps = (sum(getattr(call, name) for call in calls) for name in ("busy", "capacity", "steps"))
        parent.done(
            tokens=sum(lengths.values()),
            lengths=[lengths[row] for row, _ in prompts],  # longest prompt first
            steps=steps,
            occupancy=busy / capacity,
            before_tail=calls[0].before_tail,
        )
        seed += 1


if __name__ == "__main__":
    main()
