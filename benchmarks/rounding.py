"""What rounding does to a log-prob, and so to a margin: by dtype, layout, program and length.

    python benchmarks/rounding.py --model=DIR --rows=FILE.json [--pairs=32] [--beta=5]

Real text goes through one model as policy and as opponent, so that every margin should be 0. Printed are, in nats, the
standard deviations over pairs of [log p(y|x) - log p'(y|x)] - [log p(y'|x) - log p'(y'|x)], and the logistic loss that
these make at --beta in place of log 2 = 0.6931:

    float32, other rows       both in float32, scored in other rows than the step's
    bfloat16, other rows      both in bfloat16, scored in other rows: an opponent scored once for all steps
    bfloat16, other program   the step's rows, by a program that only scores
    bfloat16, the step's own  the step's rows and program: what a run does
    bfloat16 against float32  the same rows in two dtypes: how far from the truth a log-prob is
    after a step              bfloat16 against float32 again, as a change: the margin that one update made, in bfloat16,
                              less the same update's in float32

FILE.json is a list of {"instruction", "response"} objects; row i's generated response is row i + pairs' real one.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from spin_jax import checkpoints, models, sizing
from spin_jax.config import Config, replace  # noqa: E402
from spin_jax.data.chat_format import load_chat  # noqa: E402
from spin_jax.data.packing import Packing, Plan, of_pairs, pack_batch, plan_scoring, plan_training
from spin_jax.data.pairs import Pair  # noqa: E402
from spin_jax.devices import sharding  # noqa: E402
from spin_jax.devices.transfer import everywhere, to_devices, to_host
from spin_jax.evaluation.scoring import StepProgram, response_program  # noqa: E402
from spin_jax.models.execution import make_execution
from spin_jax.training import programs
from spin_jax.training.schedule import batch_order


class LanguageModel:
    """The model in one dtype: its log-probs by the step's program and by the scoring program."""

    def __init__(self, directory: str, dtype: str, steps: int):
        config = replace(Config(), {"model.compute_dtype": dtype, "train.learning_rate": (5e-7,)})
        self.mesh = sharding.one_device_mesh()
        self.placed = sharding.batch_sharding(self.mesh)
        shardings = models.param_shardings(self.mesh, checkpoints.read_config(pathlib.Path(directory)))
        self.model, params = checkpoints.load(directory, shardings=shardings)
        config = sizing.choose(config, self.model, list(self.mesh.devices.flat))
        execution = make_execution(config.model, self.model, self.mesh)
        self.training = programs.make_training(programs.spin_spec(config, self.model, execution, 0, steps))
        self.execution = execution
        self.state = self.training.init(params)

    def by_step(self, pairs: list[Pair], plan: Plan) -> np.ndarray:
        """[pairs, 2], by the training step's own program."""
        program = StepProgram(self.training.step, self.state, None)
        found = self._by(program, pairs, plan)
        self.state = program.state
        return found

    def by_scorer(self, pairs: list[Pair], plan: Plan) -> np.ndarray:
        """[pairs, 2], by the program of held-out pairs."""
        program = response_program(self.model, self.execution)
        return self._by(lambda batch: program(self.state.params, to_devices(batch, self.placed)), pairs, plan)

    def _by(self, run: Callable, pairs: list[Pair], plan: Plan) -> np.ndarray:
        found = np.zeros((len(pairs), 2), np.float32)
        for rows, shape in zip(plan.batches, plan.shapes, strict=True):
            logps = run(pack_batch(self.model, pairs, rows, shape).arrays)
            found[[i for row in rows for i in row]] = of_pairs(to_host(logps), rows)
        return found

    def update(self, pairs: list[Pair], plan: Plan, logps: np.ndarray) -> None:
        """A few steps, the last of them past the first of the warm-up, whose learning rate is 0."""
        for step in (0, 1):
            rows, shape = plan.batches[step], plan.shapes[step]
            batch = pack_batch(
                self.model, pairs, rows, shape, reference_logps=logps[[i for row in rows for i in row]]
            ).arrays
            put_batch = to_devices(batch, self.placed)
            self.state, _, _ = self.training.step(self.state, None, put_batch, everywhere(False, self.mesh))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--beta", type=float, default=5.0)
    args = parser.parse_args()
    pairs = read_pairs(args.model, args.rows, args.pairs)
    size = max(4, args.pairs // 4)
    plan = plan_training(pairs, batch_order(len(pairs), size, 0, len(pairs) // size), Packing(1, 256, 1024))
    other = plan_scoring(pairs, size, Packing(1, 256, 2048))
    found = {}
    for dtype in ("float32", "bfloat16"):
        lm = LanguageModel(args.model, dtype, steps=100)
        own = lm.by_step(pairs, plan)
        found[dtype] = own
        found[f"{dtype}, other rows"] = lm.by_scorer(pairs, other) - own
        found[f"{dtype}, other program"] = lm.by_scorer(pairs, plan) - own
        found[f"{dtype}, the step's own"] = lm.by_step(pairs, plan) - own
        # The same update for both, made in float32.
        if dtype == "float32":
            lm.update(pairs, plan, own)
            updated = jax.device_get(lm.state.params)
        else:
            lm.state = lm.state._replace(params=jax.tree.map(jnp.array, updated))
        found[f"{dtype}, moved"] = lm.by_step(pairs, plan) - own
        del lm
    found["bfloat16 against float32"] = found.pop("bfloat16") - found.pop("float32")
    found["after a step"] = found.pop("bfloat16, moved") - (moved := found.pop("float32, moved"))
    lengths = np.array([sum(map(len, pair.responses)) for pair in pairs])
    short = lengths <= np.median(lengths)
    heads = (f"{'all':>8}", f"{'short':>8}", f"{'long':>8}", f"{f'loss, beta {args.beta:g}':>16}")
    means = [f"{lengths[of].mean():.0f}" for of in (short, ~short)]
    print(f"{args.pairs} pairs of {means[0]} (short) and {means[1]} (long) response tokens")
    print(f"{'nats a pair':28}", *heads)
    for name, difference in found.items():
        margins = difference[:, 0] - difference[:, 1]
        loss = np.logaddexp(0, -args.beta * margins).mean()
        print(f"{name:28}", *(f"{margins[of].std():8.4f}" for of in (slice(None), short, ~short)), f"{loss:16.4f}")
    print(f"the update itself moved margins by {np.std(moved[:, 0] - moved[:, 1]):.4f}")


def read_pairs(model: str, path: str, count: int) -> list[Pair]:
    chat, rows = load_chat(pathlib.Path(model), "chat"), json.loads(pathlib.Path(path).read_text())[: 2 * count]
    prompts = [[{"role": "user", "content": row["instruction"]}] for row in rows]

    def response(asked: int, answered: int) -> np.ndarray:
        return chat.real_response(prompts[asked], rows[answered]["response"])[:400]

    return [
        Pair(i, 0, chat.generation_prompt(prompts[i])[-200:], (response(i, i), response(i, i + count)), (False, False))
        for i in range(count)
    ]


if __name__ == "__main__":
    main()
