"""This project's training step as a contestant of train_step.py.

Options: `compute_dtype` (params are float32 always), `opponent` ("stored" or "live"), `padded` (a row for each response
in place of packed rows), `row_length` and `length_multiple` of packed rows, `remat` and `logits_chunk` of
`config.model`.
"""

import itertools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxlib  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from padded import padded_batch, padded_objective  # noqa: E402
from parent import Parent  # noqa: E402

from spin_jax import models, programs, sharding  # noqa: E402
from spin_jax.batches import Packing, plan_scoring, plan_training, put, spin_batch  # noqa: E402
from spin_jax.config import base_config  # noqa: E402
from spin_jax.data.pairs import Pair  # noqa: E402
from spin_jax.score import score  # noqa: E402
from spin_jax.step import make_optimizer, spin_objective  # noqa: E402


def main() -> None:
    parent = Parent()
    s = parent.settings
    config = base_config()
    for field in ("compute_dtype", "remat", "logits_chunk"):
        config.model[field] = s[field]
    mesh = sharding.one_device_mesh()
    placed = sharding.batch_sharding(mesh)
    model = models.read_config(pathlib.Path(s["model"]))
    _, params = models.load(s["model"], shardings=models.param_shardings(mesh, model))
    compute = programs.make_compute(config.model, model, mesh)
    packing = Packing(1, s["length_multiple"], s["row_length"])
    size, pairs = len(s["batches"][0]), [as_pair(ids) for batch in s["batches"] for ids in batch]
    opponent, logps = None, np.zeros((len(pairs), 2), np.float32)
    if s["opponent"] == "live":
        opponent = jax.tree.map(jnp.copy, models.for_compute(params, compute.dtype))
    else:
        scorer, plan = programs.make_scorer(model, compute), plan_scoring(pairs, size, packing)
        logps = score(scorer, params, model, pairs, plan, sharding=placed, name="score")
    if s["padded"]:
        firsts, multiple = range(0, len(pairs), size), s["length_multiple"]
        batches = [padded_batch(pairs[i : i + size], logps[i : i + size], multiple) for i in firsts]
        objective = padded_objective(model, compute, s["beta"])
    else:
        plan = plan_training(pairs, np.arange(len(pairs)).reshape(-1, size), packing)
        batches = [
            spin_batch(model, pairs, rows, shape, logps[list(itertools.chain(*rows))]).arrays
            for rows, shape in zip(plan.batches, plan.shapes, strict=True)
        ]
        objective = spin_objective(model, compute, "logistic", s["beta"])
    optimizer = make_optimizer("rmsprop", optax.constant_schedule(s["learning_rate"]), s["clip_norm"], 0.0)
    init, train_step = programs.jit_training(objective, optimizer, 1, params, mesh)
    state = init(params)
    parent.ready(jax=jax.__version__, jaxlib=jaxlib.__version__)
    step = 0
    while True:
        parent.wait()
        batch = put(batches[step % len(batches)], placed)
        state, metrics, _ = jax.block_until_ready(train_step(state, opponent, batch))
        parent.done(loss=float(metrics["loss"]), real_logp=float(metrics["logps/real"]))
        step += 1


def as_pair(ids: dict[str, list[int]]) -> Pair:
    return Pair(0, 0, *(np.array(ids[k], np.int32) for k in ("prompt", "real", "generated")), False, False)


if __name__ == "__main__":
    main()
