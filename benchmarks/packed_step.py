"""What packing and a stored opponent save on a TPU, by its compiler: a training step of a 7B model.

    python benchmarks/packed_step.py [SLICE ...]        (v5e-16 without one)

Two steps over the same 64 pairs are compiled for a slice that is not there, and compared by what the compile check
(docs/compile_check.md) says of them:

    padded  what a DPO trainer does: each response in a row of its own behind a copy of its prompt, padded to 1,024
            tokens, and the opponent's forward pass in every step
    packed  a run of configs/zephyr_7b.py:SLICE,code: pairs share rows, the prompt once, the opponent scored before

Before that, and in seconds, it tells how full the rows of many such batches are on more and fewer devices.

Lengths are drawn, since the data is not here: log-normal with the medians and spreads below, cut where the config cuts.
They are a guess at UltraChat's first turns. Needs libtpu (pip install 'jax[tpu]'), and no TPU.
"""

import argparse
import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from spin_jax.compile_check import check  # noqa: E402
from spin_jax.config import Config, freeze, replace  # noqa: E402
from spin_jax.data.packing import Packing, plan_training  # noqa: E402
from spin_jax.data.pairs import Pair  # noqa: E402
from spin_jax.devices.accelerators import GiB, find_slice  # noqa: E402
from spin_jax.kernels import KERNELS  # noqa: E402

PAIRS = 64
WAYS, BATCHES = (8, 16, 32, 64), 400  # devices that split the rows; batches over which their fill is taken
SHAPES = (1, 2, 3, 4, None)  # that the batches have at most (config.train.row_shapes)
# Tokens: median and sigma of the logarithm. A model's answers are as long as those it was fine-tuned on.
PROMPT, RESPONSE = (120, 0.9), (280, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", nargs="*", metavar="SLICE", default=["v5e-16"])
    for name in parser.parse_args().slices:
        config = load_config(f"{name},code")
        print(f"{name}: how full rows are, over {BATCHES} batches of {PAIRS} pairs of at most so many shapes")
        print(f"{'devices':8}" + "".join(f"{shapes or 'any':>8}" for shapes in SHAPES))
        for num_shards in WAYS:
            fills = [fill(config, num_shards, BATCHES, shapes) for shapes in SHAPES]
            print(f"{num_shards:<8}" + "".join(f"{share:8.1%}" for share in fills), flush=True)
        lengths = draw(config, PAIRS)
        packed = report(config, name, lengths)
        config = replace(config, {"spin.opponent": "live"})
        # A pair with a prompt of one token is a row of 1,024 for each response: the padded step's arithmetic.
        length = config.data.max_length
        padded = report(config, name, [(1, length, length)] * PAIRS)
        means = ", ".join(f"{mean:.0f}" for mean in np.mean(lengths, axis=0))
        print(f"{name}: {PAIRS} pairs of {means} tokens on average (prompt, real, generated)")
        print(f"{'':8}{'compiler':>12}{'kernels':>12}{'exposed':>12}{'in all':>12}{'TFLOP':>10}{'GiB':>8}")
        for kind, one in (("padded", padded), ("packed", packed)):
            seconds = [one.work.seconds[line] for line in ("compiler", "kernels", "exposed")]
            flops = (one.work.flops + one.work.kernel_flops) / 1e12
            print(f"{kind:8}" + "".join(f"{s:10.3f} s" for s in [*seconds, sum(seconds)]), end="")
            print(f"{flops:10.1f}{one.total_bytes / GiB:8.2f}")
        print(f"ratio   {padded.work.seconds['compiler'] / packed.work.seconds['compiler']:10.2f}", end="")
        print(f"{'':26}{sum(padded.work.seconds.values()) / sum(packed.work.seconds.values()):10.2f}\n", flush=True)


def load_config(argument: str) -> Config:
    spec = importlib.util.spec_from_file_location("zephyr_7b", ROOT / "configs" / "zephyr_7b.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument)
    config.train.row_length = KERNELS["flash"].row_length
    return freeze(config)


def fill(config: Config, num_shards: int, batches: int, shapes: int | None = None) -> float:
    """The share of all slots that is not padding, where so many devices split the rows of each batch."""
    lengths = draw(config, batches * PAIRS)
    parts = ([np.zeros(tokens, np.int32) for tokens in pair] for pair in lengths)
    pairs = [Pair(0, 0, prompt, tuple(responses), (False, False)) for prompt, *responses in parts]
    packing = Packing(num_shards, config.train.length_multiple, config.train.row_length, shapes or batches)
    return plan_training(pairs, np.arange(len(pairs)).reshape(batches, PAIRS), packing).fill


def draw(config: Config, pairs: int) -> list[tuple[int, int, int]]:
    """(prompt, real, generated) tokens of each pair."""
    rng = np.random.default_rng(0)
    prompts = draw_lengths(rng, *PROMPT, pairs, config.data.max_prompt_length)
    real, generated = (draw_lengths(rng, *RESPONSE, pairs, config.data.max_length) for _ in range(2))
    room = config.data.max_length - prompts
    real, generated = np.minimum(real, room), np.minimum(generated, np.minimum(room, config.generate.max_new_tokens))
    return [tuple(map(int, pair)) for pair in zip(prompts, real, generated, strict=True)]


def draw_lengths(rng: np.random.Generator, median: float, sigma: float, count: int, longest: int) -> np.ndarray:
    return np.clip(median * np.exp(sigma * rng.standard_normal(count)), 1, longest).astype(int)


def report(config: Config, name: str, lengths: list[tuple[int, int, int]]):
    (found,) = check.check(config, find_slice(name), lengths=lengths, names=["train step"])
    return found


if __name__ == "__main__":
    main()
