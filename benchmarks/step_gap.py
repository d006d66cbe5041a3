"""Does the device wait for Python? A training stage's loop against its bare step, on the machine's own devices.

    python benchmarks/step_gap.py [--model=DIRECTORY] [--pairs=16] [--length=128] [--steps=8] [--rounds=12]

A is `training.loop.fit` as a run calls it: batches are made, sent and logged. B is the same jitted step, called again
and again on batches that are on the devices already; its metrics are read a step late, as in A. They take turns, one or
the other first. The gap of a round is that of its medians of the times between two calls; told are the rounds' median
and, for what a busy machine makes of it, their quartiles. No other load disturbs the rest: how often A called the step
when the devices had nothing left to do, and what the host spends on a batch. On a CPU the host's work takes cores from
the step, which is part of the gap there.

Weights are random, and so are the tokens: they cost what others cost. --model takes the shape of a model from its
directory; without, it is the quickstart's tiny one.
"""

import argparse
import logging
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from etils import epath  # noqa: E402

from spin_jax import checkpoints, models, sizing
from spin_jax.config import Config, ToyConfig  # noqa: E402
from spin_jax.data.packing import Packing, pack_batch, plan_training
from spin_jax.data.pairs import Pair  # noqa: E402
from spin_jax.devices import sharding
from spin_jax.devices.transfer import to_devices  # noqa: E402
from spin_jax.models.execution import make_execution
from spin_jax.objectives import OBJECTIVES  # noqa: E402
from spin_jax.objectives.interface import Settings, batch_loss  # noqa: E402
from spin_jax.tasks import toy  # noqa: E402
from spin_jax.training import programs
from spin_jax.training.loop import LoopSpec, fit  # noqa: E402
from spin_jax.training.optimizer import learning_rate_schedule, make_optimizer
from spin_jax.training.schedule import batch_order

ROWS = 2_000  # of the data set that the batches are drawn from
WARM_UP = 3  # calls that are not counted


class Training:
    """The programs of a training stage, and its batches."""

    def __init__(self, model: models.ModelConfig, pairs: int, length: int, steps: int):
        config = sizing.choose(Config(), model, jax.devices())
        self.mesh, self.model = sharding.make_mesh(), model
        sharding.check_pairs(self.mesh, pairs, 1)
        execution = make_execution(config.model, model, self.mesh)
        self.schedule = learning_rate_schedule(1e-6, 1000, 0.1)
        shardings = models.param_shardings(self.mesh, model)
        self._new_params = jax.jit(lambda: models.init_params(model, jax.random.key(0)), out_shardings=shardings)
        self.init, self.step = programs.jit_training(
            batch_loss(OBJECTIVES["logistic"], Settings(beta=0.1), model, execution),
            make_optimizer("rmsprop", self.schedule, 1.0, 0.0),
            1,
            self._new_params(),
            self.mesh,
        )
        self.sharding = sharding.batch_sharding(self.mesh)
        rng = np.random.default_rng(0)
        ids = lambda: rng.integers(1, model.vocab_size, length // 2, dtype=np.int32)  # noqa: E731
        self._pairs = [Pair(i, 0, ids(), (ids(), ids()), (False, False)) for i in range(ROWS)]
        packing = Packing(sharding.num_shards(self.mesh, "rows"), 128, config.train.row_length)
        self._plan = plan_training(self._pairs, batch_order(ROWS, pairs, 0, steps), packing)

    def new_state(self):
        return self.init(self._new_params())

    def make_batch(self, step: int):
        return pack_batch(self.model, self._pairs, self._plan.batches[step], self._plan.shapes[step])


def in_the_loop(training: Training, steps: int) -> tuple[list[float], list[bool]]:
    """A: (seconds between two calls of the step, whether the devices had ended the one before at the call)."""
    calls, starved, last = [], [], None

    def step(state, *args):
        nonlocal last
        calls.append(time.perf_counter())
        starved.append(last is not None and last.is_ready())
        state, metrics, logps = training.step(state, *args)
        last = metrics["loss"]
        return state, metrics, logps

    with tempfile.TemporaryDirectory() as directory:
        spec = LoopSpec(
            name="A",
            steps=steps + WARM_UP,
            directory=epath.Path(directory),
            checkpoint_every=steps + WARM_UP,
            sharding=training.sharding,
            schedule=training.schedule,
            flops_multiplier=3,
        )
        fit(step, training.new_state(), None, training.make_batch, spec)
    return np.diff(calls)[WARM_UP - 1 :].tolist(), starved[WARM_UP:]


def bare(training: Training, steps: int) -> list[float]:
    """B: seconds between two calls of the step, each on a batch that is there."""
    batches = [to_devices(training.make_batch(step).arrays, training.sharding) for step in range(2)]
    state, calls, last = training.new_state(), [], None
    jax.block_until_ready((state, batches))
    for step in range(steps + WARM_UP):
        calls.append(time.perf_counter())
        state, metrics, _ = training.step(state, None, batches[step % 2])
        if last is not None:
            jax.device_get(last)
        last = metrics
    jax.block_until_ready(state)
    return np.diff(calls)[WARM_UP - 1 :].tolist()


def batch_seconds(training: Training, times: int) -> float:
    """What the host spends on a batch: laying it out and sending it."""
    seconds = []
    for step in range(times):
        begin = time.perf_counter()
        to_devices(training.make_batch(step).arrays, training.sharding)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="directory of a model, for its shape")
    for name, default in {"pairs": 16, "length": 128, "steps": 8, "rounds": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    model = checkpoints.read_config(flags.model) if flags.model else toy.model_config(ToyConfig())
    training = Training(model, flags.pairs, flags.length, flags.steps + WARM_UP)
    loop, alone, starved = [], [], []  # a median a round; of every call
    for turn in range(flags.rounds):
        if turn % 2:
            alone.append(statistics.median(bare(training, flags.steps)))
        seconds, waited = in_the_loop(training, flags.steps)
        loop.append(statistics.median(seconds))
        starved += waited
        if not turn % 2:
            alone.append(statistics.median(bare(training, flags.steps)))
    gaps = [100 * (a - b) / b for a, b in zip(loop, alone, strict=True)]
    low, middle, high = statistics.quantiles(gaps, n=4)
    device = jax.devices()[0]
    print(f"{jax.device_count()} x {device.device_kind}, {flags.pairs} pairs of 2 x {flags.length} tokens")
    print(f"A, in the loop    {1e3 * statistics.median(loop):9.2f} ms a step")
    print(f"B, the bare step  {1e3 * statistics.median(alone):9.2f} ms a step")
    print(f"gap               {middle:9.2f} % of a step, quartiles {low:.2f} and {high:.2f}")
    print(f"starved           {sum(starved):9d} of {len(starved)} calls found the devices idle")
    print(f"host, a batch     {1e3 * batch_seconds(training, flags.steps):9.2f} ms to lay out and send")


if __name__ == "__main__":
    main()
