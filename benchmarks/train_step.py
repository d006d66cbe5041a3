"""SPIN's training step here against what is used today: pairs per second, with the same pairs, weights and optimizer.

    python benchmarks/train_step.py --model=DIR --pairs=FILE [--peer_python=PATH] [--json=FILE] [CONTESTANT ...]

The first contestant named is measured against each of the others. Both are loaded, in processes of their own, and make
their steps in turn, one asleep while the other works, so that whatever else the machine does meets both; the ratio is
the median over these rounds. benchmarks/README.md says where the files come from and what was measured.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from contest import Worker, is_runnable, machine, spread  # noqa: E402

from spin_jax.data.chat_format import chat_format, fit  # noqa: E402
from spin_jax.data.sources import load_examples  # noqa: E402

_OURS = {
    "compute_dtype": "float32",
    "opponent": "stored",
    "padded": False,
    "row_length": 2048,
    "length_multiple": 64,
    "remat": "mlp",
    "logits_chunk": 0,
    "huge_pages": True,
}
_TRL = {"weights": "float32", "autocast": False, "precompute": True, "micro_batch": None, "compile": False}
_AUTHORS = {"weights": "float32", "autocast": False}
_BFLOAT16 = {"weights": "bfloat16"}  # faster; bfloat16 cannot hold most of what a learning rate of 5e-7 changes
_SINGLE = {"micro_batch": 1}  # pairs: a row is padded to the other of its pair, and no further

# name -> (file in contestants/, options). "f32" in a name: float32 throughout.
CONTESTANTS: dict[str, tuple[str, dict]] = {
    "spin_jax/f32": ("spin_jax_step", _OURS),
    "spin_jax/bf16": ("spin_jax_step", _OURS | {"compute_dtype": "bfloat16"}),
    "spin_jax/bf16-small-pages": ("spin_jax_step", _OURS | {"compute_dtype": "bfloat16", "huge_pages": False}),
    "spin_jax/bf16-chunked": ("spin_jax_step", _OURS | {"compute_dtype": "bfloat16", "logits_chunk": 256}),
    "spin_jax/bf16-padded": ("spin_jax_step", _OURS | {"compute_dtype": "bfloat16", "padded": True}),
    "spin_jax/bf16-padded-live": (
        "spin_jax_step",
        _OURS | {"compute_dtype": "bfloat16", "padded": True, "opponent": "live"},
    ),
    "spin_jax/f32-live": ("spin_jax_step", _OURS | {"opponent": "live"}),
    "spin_jax/bf16-live": ("spin_jax_step", _OURS | {"compute_dtype": "bfloat16", "opponent": "live"}),
    "spin_jax/f32-padded": ("spin_jax_step", _OURS | {"padded": True}),
    "spin_jax/f32-padded-live": ("spin_jax_step", _OURS | {"padded": True, "opponent": "live"}),
    "trl/f32": ("trl_step", _TRL),
    "trl/f32-single": ("trl_step", _TRL | _SINGLE),
    "trl/autocast": ("trl_step", _TRL | {"autocast": True}),
    "trl/autocast-single": ("trl_step", _TRL | {"autocast": True} | _SINGLE),
    "trl/bf16": ("trl_step", _TRL | _BFLOAT16),
    "trl/bf16-single": ("trl_step", _TRL | _BFLOAT16 | _SINGLE),
    "trl/bf16-single-huge-pages": ("trl_step", _TRL | _BFLOAT16 | _SINGLE | {"huge_pages": True}),
    "trl/f32-live": ("trl_step", _TRL | {"precompute": False}),
    "trl/f32-compile": ("trl_step", _TRL | {"compile": True}),
    "uclaml/f32": ("uclaml_step", _AUTHORS),
    "uclaml/autocast": ("uclaml_step", _AUTHORS | {"autocast": True}),
    "uclaml/bf16": ("uclaml_step", _AUTHORS | _BFLOAT16 | {"autocast": True}),
}
OPTIMIZATION = {"beta": 0.1, "learning_rate": 5e-7, "clip_norm": 1.0}

# By how much contestants may differ and still have computed the same thing, where all is float32 and elsewhere: the
# mean of log p(y|x) over the first batch, relative, and the losses of the first pass, in nats.
TOLERANCES = {"f32": {"real_logp": 1e-5, "losses": 1e-3}, "bf16": {"real_logp": 1e-2, "losses": 5e-2}}


def main() -> None:
    arguments = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # for the contestants, too
    batches = read_batches(arguments)
    settings = OPTIMIZATION | {
        "model": str(arguments.model),
        "batches": batches,
        "max_length": arguments.max_length,
    }
    report = {"machine": machine(), "threads": arguments.threads, "pairs": describe(batches), "duels": []}
    print(*(f"{name}: {value}" for name, value in report.items() if name != "duels"), sep="\n")
    first, *others = [name for name in arguments.contestants if is_runnable(name, arguments.peer_python)]
    with Worker(first, CONTESTANTS[first], settings, arguments) as ours:
        ours.first_pass(len(batches))
        report["first"] = {"name": first, "versions": ours.versions, "options": CONTESTANTS[first][1]}
        print(f"first: {report['first']}\n\n{HEADER}")
        for name in others:
            with Worker(name, CONTESTANTS[name], settings, arguments) as peer:
                report["duels"].append(duel(ours, peer, arguments.passes))
            print(row(report["duels"][-1], len(batches[0])), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if wrong := [duel["name"] for duel in report["duels"] if not duel["same"]]:
        sys.exit(f"not the computation of {first}: {', '.join(wrong)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="*", metavar="CONTESTANT", help=f"of {', '.join(CONTESTANTS)}; none: all")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="Hugging Face directory")
    parser.add_argument("--pairs", required=True, help="real and generated responses: a run's pairs.parquet, or JSONL")
    parser.add_argument("--peer_python", help="python of an environment with requirements-trl.txt, for trl and uclaml")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs a step")
    parser.add_argument("--batches", type=int, default=4, help="different batches, taken in turn")
    parser.add_argument("--passes", type=int, default=3, help="timed passes over them; another one warms up")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--json", type=pathlib.Path, help="all that was measured goes there")
    arguments = parser.parse_args()
    arguments.contestants = arguments.contestants or list(CONTESTANTS)
    if unknown := [name for name in arguments.contestants if name not in CONTESTANTS]:
        parser.error(f"no contestant is called {unknown[0]}: there are {', '.join(CONTESTANTS)}")
    return arguments


# ---- pairs


def read_batches(arguments: argparse.Namespace) -> list[list[dict]]:
    """The first pairs of the file as token ids, as a run would train on them."""
    from transformers import AutoTokenizer

    chat = chat_format(AutoTokenizer.from_pretrained(arguments.model))
    size, count = arguments.batch_size, arguments.batches
    examples = load_examples(arguments.pairs, layout="pairs").examples[: size * count]
    if len(examples) < size * count:
        sys.exit(f"{arguments.pairs} has {len(examples)} pairs, not {count} batches of {size}: lower --batches")
    pairs = []
    for example in examples:
        prompt, real = chat.training_prompt(example.prompt), chat.real_response(example.prompt, example.response)
        generated = chat.generated_response(example.prompt, example.generated, example.truncated)
        limits = {"max_length": arguments.max_length, "max_prompt_length": arguments.max_length // 2}
        fitted = fit(prompt, real, generated, **limits)
        names = ("prompt", "real", "generated")
        pairs.append({k: ids.tolist() for k, ids in zip(names, (fitted.prompt, *fitted.responses), strict=True)})
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def describe(batches: list[list[dict]]) -> dict:
    """Lengths, and the tokens that a step computes on average in three layouts."""
    pairs = [pair for batch in batches for pair in batch]
    lengths = {name: sorted(len(pair[name]) for pair in pairs) for name in ("prompt", "real", "generated")}
    quartiles = {k: [v[0], *map(round, statistics.quantiles(v, n=4)), v[-1]] for k, v in lengths.items()}

    def longest(chosen: list[dict]) -> int:
        return max(len(pair["prompt"]) + max(len(pair["real"]), len(pair["generated"])) for pair in chosen)

    padded = sum(2 * len(batch) * longest(batch) for batch in batches)
    rows = sum(2 * len(pair["prompt"]) + len(pair["real"]) + len(pair["generated"]) for pair in pairs)
    tokens = {"padded to the batch's longest": padded, "no padding": rows}
    tokens["no padding, prompt once"] = rows - sum(lengths["prompt"])
    means = {layout: round(count / len(batches)) for layout, count in tokens.items()}
    return {"a step": len(batches[0]), "steps": len(batches), "min, quartiles, max": quartiles, "tokens a step": means}


# ---- contestants


def duel(ours: Worker, peer: Worker, passes: int) -> dict:
    """Passes over the same batches in turn; who begins changes from pass to pass.

    A step before each pass is not timed: of a process that sleeps the system may take the memory that it had freed (the
    host of a virtual machine does), and a program that trains does not sleep.
    """
    batches = len(ours.first)
    peer.first_pass(batches)
    rounds = []
    for i in range(passes):
        order = (ours, peer) if i % 2 == 0 else (peer, ours)
        turns = {worker: [worker.step() for _ in range(1 + batches)][1:] for worker in order}
        rounds += [{"first": a, "peer": b} for a, b in zip(turns[ours], turns[peer], strict=True)]
    options = CONTESTANTS[peer.name][1]
    found = differences(ours, peer)
    allowed = TOLERANCES["f32" if "/f32" in ours.name and "/f32" in peer.name else "bf16"]
    same = all(found[name] <= allowed[name] for name in allowed)
    facts = {"name": peer.name, "versions": peer.versions, "options": options, "differences": found, "same": same}
    return facts | {"losses": [[step["loss"] for step in worker.first] for worker in (ours, peer)], "rounds": rounds}


def differences(ours: Worker, peer: Worker) -> dict[str, float]:
    """What says that two contestants compute the same: see TOLERANCES. The first loss is log 2 for whoever has the same
    model twice; the later ones depend on gradients and updates."""
    logps = [worker.first[0]["real_logp"] for worker in (ours, peer)]
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(ours.first, peer.first, strict=True)]
    return {"real_logp": abs(logps[1] / logps[0] - 1), "losses": max(losses)}


# ---- report

HEADER = (
    f"{'':20} {'seconds a step':>20} {'pairs/s':>8} {'CPU s':>6} {'GiB':>5} {'others':>7} | "
    f"{'first: seconds':>20} {'CPU s':>6} {'GiB':>5} | {'ratio':>18} {'CPU ratio':>10}  same?"
)


def row(duel: dict, size: int) -> str:
    """A line of the table: medians, and in brackets the least and the greatest."""
    peer, first = (
        {k: [r[who][k] for r in duel["rounds"]] for k in duel["rounds"][0][who]} for who in ("peer", "first")
    )
    ratios, cpu_ratios = ([p / f for p, f in zip(peer[k], first[k], strict=True)] for k in ("seconds", "cpu_seconds"))
    median = statistics.median
    return (
        f"{duel['name']:20} {spread(peer['seconds']):>20} {size / median(peer['seconds']):8.2f} "
        f"{median(peer['cpu_seconds']):6.1f} {max(peer['peak_rss']) / 2**30:5.1f} {median(peer['others']):7.2f} | "
        f"{spread(first['seconds']):>20} {median(first['cpu_seconds']):6.1f} {max(first['peak_rss']) / 2**30:5.1f} | "
        f"{spread(ratios):>18} {median(cpu_ratios):10.2f}  {'yes' if duel['same'] else 'NO'} {duel['differences']}"
    )


if __name__ == "__main__":
    main()
