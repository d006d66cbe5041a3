"""How the time of a training step grows: with the pairs' length, measured here; with devices, by the TPU's compiler.

    python benchmarks/growth.py [--model=DIR] [--slices=v5e-8,v5e-16,...] [--tensor=N] [--json=FILE] [--plot=FILE.png]

Length: a model of SmolLM2-135M's shape (or that of --model) with random weights, the same number of tokens a step in
pairs of 512 to 8,192 of them (a quarter prompt, the rest the two responses), with attention by tiles and with plain
attention in turn. Plain attention holds all scores of a row, and is left out where they take more than PLAIN_BYTES.

Devices: a training step of configs/zephyr_7b.py:SLICE,code on 64 pairs whose lengths are drawn as packed_step.py draws
them, compiled for slices of v5e that are not there. Needs libtpu (pip install 'jax[tpu]').
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import packed_step  # noqa: E402

from spin_jax import checkpoints, models, sizing  # noqa: E402
from spin_jax.compile_check.known_models import known  # noqa: E402
from spin_jax.config import Config, replace  # noqa: E402
from spin_jax.data.packing import Packing, pack_batch, plan_training  # noqa: E402
from spin_jax.data.pairs import Pair  # noqa: E402
from spin_jax.devices import sharding  # noqa: E402
from spin_jax.devices.accelerators import GiB, find_slice  # noqa: E402
from spin_jax.devices.transfer import to_devices  # noqa: E402
from spin_jax.models.execution import make_execution  # noqa: E402
from spin_jax.objectives import OBJECTIVES  # noqa: E402
from spin_jax.objectives.interface import Settings, batch_loss  # noqa: E402
from spin_jax.training import programs  # noqa: E402
from spin_jax.training.optimizer import learning_rate_schedule, make_optimizer  # noqa: E402

TOKENS = 8192  # a step
LENGTHS = (512, 1024, 2048, 4096, 8192)
ROUNDS = 3
PLAIN_BYTES = 2 * GiB  # f32 scores of one layer; the backward pass holds a few times as much
SLICES = "v5e-8,v5e-16,v5e-64,v5e-256"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, help="directory of a model, for its shape")
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",") if x], default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step")
    parser.add_argument("--slices", type=lambda text: [x for x in text.split(",") if x], default=SLICES.split(","))
    parser.add_argument("--tensor", type=int, help="devices that split a matrix; fsdp takes the others")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    flags = parser.parse_args()
    model = checkpoints.read_config(flags.model) if flags.model else known(SMOLLM2)
    lengths = [with_length(model, length, flags.tokens) for length in flags.lengths]
    devices = [with_devices(name, flags.tensor) for name in flags.slices]
    if flags.json:
        flags.json.write_text(json.dumps({"lengths": lengths, "devices": devices}, indent=1) + "\n")
    if flags.plot:
        plot(lengths, devices, flags.plot)


# ---- length


def with_length(model: models.ModelConfig, length: int, tokens: int) -> dict:
    """Median seconds a step with pairs of so many tokens, by kind of attention; steps are made in turn."""
    rng = np.random.default_rng(0)
    parts = (length // 4, length * 3 // 8, length * 3 // 8)
    prompt, *responses = (rng.integers(1, model.vocab_size, n, np.int32) for n in parts)
    pairs = [Pair(0, 0, prompt, tuple(responses), (False, False))] * (tokens // length)
    kinds = ["tiled", "plain"] if model.num_heads * length * tokens * 4 <= PLAIN_BYTES else ["tiled"]
    steps = {kind: make_stepper(model, pairs, length, kind) for kind in kinds}
    seconds = {kind: [] for kind in kinds}
    for turn in range(1 + ROUNDS):
        for kind in kinds if turn % 2 else kinds[::-1]:
            begin = time.perf_counter()
            steps[kind]()
            seconds[kind].append(time.perf_counter() - begin)
    medians = {kind: statistics.median(taken[1:]) for kind, taken in seconds.items()}  # the first one compiles
    print(f"{length:6} tokens a pair: " + ", ".join(f"{k} {s:.2f} s a step" for k, s in medians.items()), flush=True)
    return {"length": length, "tokens": tokens, "seconds": medians, "all": seconds}


def make_stepper(model: models.ModelConfig, pairs: list[Pair], length: int, attention: str):
    """A function that makes one step and waits for it. One row a pair, which is the best that plain attention can have;
    so the two differ in what they skip inside a pair, and in memory."""
    config = replace(Config(), {"model.attention": attention})
    mesh = sharding.one_device_mesh()
    config = sizing.choose(config, model, list(mesh.devices.flat))
    execution = make_execution(config.model, model, mesh)
    shardings = models.param_shardings(mesh, model)
    params = jax.jit(lambda: models.init_params(model, jax.random.key(0)), out_shardings=shardings)()
    objective = batch_loss(OBJECTIVES["logistic"], Settings(beta=0.1), model, execution)
    optimizer = make_optimizer("rmsprop", learning_rate_schedule(1e-6, 1000, 0.1), 1.0, 0.0)
    init, step = programs.jit_training(objective, optimizer, 1, params, mesh)
    plan = plan_training(pairs, np.arange(len(pairs))[None], Packing(1, 64, length))
    batch = to_devices(pack_batch(model, pairs, plan.batches[0], plan.shapes[0]).arrays, sharding.batch_sharding(mesh))
    state = init(params)

    def make_step() -> None:
        nonlocal state
        state, metrics, _ = step(state, None, batch)
        jax.block_until_ready((state, metrics))

    return make_step


# ---- devices


def with_devices(name: str, tensor: int | None) -> dict:
    """What the compile check says of a step on a slice; a `tensor` of None is that of the config."""
    config, devices = packed_step.load_config(f"{name},code"), find_slice(name).devices
    if tensor:
        config = replace(config, {"mesh.fsdp": devices // tensor, "mesh.tensor": tensor})
    found = packed_step.report(config, name, packed_step.draw(config, packed_step.PAIRS))
    mesh = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    one = {"slice": name, "devices": devices, "mesh": mesh, "seconds": dict(found.work.seconds)}
    one |= {"bytes": found.total_bytes, "mfu": found.mfu}
    pairs = packed_step.PAIRS / sum(one["seconds"].values())
    parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in one["seconds"].items())
    print(
        f"{name:9} {parts}; {pairs:.0f} pairs/s, {pairs / devices:.2f} a chip; {one['bytes'] / GiB:.1f} GiB", flush=True
    )
    return one | {"pairs_per_second": pairs}


def plot(lengths: list[dict], devices: list[dict], file: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    panels = [draw for draw, found in ((plot_lengths, lengths), (plot_devices, devices)) if found]
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes, lengths if draw is plot_lengths else devices)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def plot_lengths(axes, lengths: list[dict]) -> None:
    for kind in ("tiled", "plain"):
        drawn = [one for one in lengths if kind in one["seconds"]]
        rates = [one["tokens"] / one["seconds"][kind] for one in drawn]
        axes.plot([one["length"] for one in drawn], rates, "o-", label=f"{kind} attention")
    axes.set(xscale="log", xlabel="tokens a pair", ylabel="tokens per second", ylim=(0, None))
    axes.set_xticks([one["length"] for one in lengths], [str(one["length"]) for one in lengths])
    axes.minorticks_off()


def plot_devices(axes, devices: list[dict]) -> None:
    counts, rates = [one["devices"] for one in devices], [one["pairs_per_second"] for one in devices]
    axes.plot(counts, rates, "o-", label="by the compile check")
    best = max(rate / count for rate, count in zip(rates, counts, strict=True))
    axes.plot(counts, [best * count for count in counts], ":", label="in proportion to the best")
    axes.set(xscale="log", yscale="log", xlabel="chips", ylabel="pairs per second")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()


if __name__ == "__main__":
    main()
