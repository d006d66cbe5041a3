"""This project's training step as a contestant of train_step.py.

Options: `compute_dtype` (params are float32 always), `opponent` ("stored" or "live"), `padded` (a row for each response
in place of packed rows), `row_length` and `length_multiple` of packed rows, `remat`, `logits_chunk` and, where it is
given, `attention` of `config.model`. With packed rows and a stored opponent also `micro_batches`, and `lora_rank` for
low-rank updates. Of random weights no log-probs are stored: the opponent's count as 0, which costs the same.
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

from spin_jax import checkpoints, models
from spin_jax.config import Config, TrainConfig, replace  # noqa: E402
from spin_jax.data.packing import Packing, pack_batch, plan_training
from spin_jax.data.pairs import Pair  # noqa: E402
from spin_jax.devices import sharding  # noqa: E402
from spin_jax.devices.transfer import to_devices  # noqa: E402
from spin_jax.evaluation.scoring import Scorer  # noqa: E402
from spin_jax.models.execution import make_execution
from spin_jax.models.params import make_resharding
from spin_jax.objectives import OBJECTIVES  # noqa: E402
from spin_jax.objectives.interface import Settings, batch_loss  # noqa: E402
from spin_jax.training import programs
from spin_jax.training.optimizer import make_optimizer
from spin_jax.training.train_step import on_adapters


def main() -> None:
    parent = Parent()
    s = parent.settings
    fields = ("compute_dtype", "remat", "logits_chunk", "attention")
    config = replace(Config(), {f"model.{field}": s[field] for field in fields if field in s})
    mesh = sharding.one_device_mesh()
    placed = sharding.batch_sharding(mesh)
    parts, rank = s.get("micro_batches", 1), s.get("lora_rank", 0)
    model = checkpoints.read_config(s["model"])
    execution = make_execution(config.model, model, mesh)
    params, is_random = load(pathlib.Path(s["model"]), model, execution, cast=bool(rank))
    packing = Packing(parts, s["length_multiple"], s["row_length"])
    size, pairs = len(s["batches"][0]), [as_pair(ids) for batch in s["batches"] for ids in batch]
    opponent, logps = None, np.zeros((len(pairs), 2), np.float32)
    if s["opponent"] == "live":
        opponent = jax.tree.map(jnp.copy, models.cast_params(model, params, execution.dtype))
    elif not is_random:
        sizes = {"row_length": s["row_length"], "length_multiple": s["length_multiple"]}
        logps = Scorer(model, TrainConfig(batch_size=size, micro_batches=1, **sizes), execution).score(params, pairs)
    if s["padded"]:
        firsts, multiple = range(0, len(pairs), size), s["length_multiple"]
        batches = [padded_batch(pairs[i : i + size], logps[i : i + size], multiple) for i in firsts]
        objective = padded_objective(model, execution, s["beta"])
    else:
        plan = plan_training(pairs, np.arange(len(pairs)).reshape(-1, size), packing)
        batches = [
            pack_batch(model, pairs, rows, shape, reference_logps=logps[list(itertools.chain(*rows))]).arrays
            for rows, shape in zip(plan.batches, plan.shapes, strict=True)
        ]
        objective = batch_loss(OBJECTIVES["logistic"], Settings(beta=s["beta"]), model, execution)
    if rank:
        opponent = params
        lora = replace(config, {"lora.rank": rank}).lora
        params = programs.make_adapters(model, lora, mesh)(jax.random.key(0))
        objective = on_adapters(objective, lora.scale, live=False)
    optimizer = make_optimizer("rmsprop", optax.constant_schedule(s["learning_rate"]), s["clip_norm"], 0.0)
    init, train_step = programs.jit_training(objective, optimizer, parts, params, mesh)
    state = init(params)
    del params
    device = jax.devices()[0]
    rows = [] if s["padded"] else sorted({batch.rows.tokens_BT.shape for batch in batches})
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    parent.ready(**versions, device=device.device_kind, attention=execution.kernel or "plain", rows=rows)
    step = 0
    while True:
        parent.wait()
        batch = to_devices(batches[step % len(batches)], placed)
        state, metrics, _ = jax.block_until_ready(train_step(state, opponent, batch))
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        parent.done(loss=float(metrics["loss"]), real_logp=float(metrics["logps/real"]), peak_on_device=peak)
        step += 1


def load(
    directory: pathlib.Path, model: models.ModelConfig, execution: models.Execution, cast: bool
) -> tuple[dict, bool]:
    """(params, whether they are random). `cast`: in the compute dtype, without a float32 copy where they are random."""
    shardings = models.param_shardings(execution.mesh, model)
    if any(directory.glob("*.safetensors")):
        _, params = checkpoints.load(directory, shardings=shardings)
        return make_resharding(model, execution)(params) if cast else params, False

    def draw() -> dict:
        params = models.init_params(model, jax.random.key(0))
        return models.cast_params(model, params, execution.dtype) if cast else params

    return jax.jit(draw, out_shardings=shardings)(), True


def as_pair(ids: dict[str, list[int]]) -> Pair:
    prompt, *responses = (np.array(ids[name], np.int32) for name in ("prompt", "real", "generated"))
    return Pair(0, 0, prompt, tuple(responses), (False, False))


if __name__ == "__main__":
    main()
