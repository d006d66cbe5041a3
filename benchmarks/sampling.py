"""Sampling here against what is used today: tokens per second, on the same prompts and weights.

    python benchmarks/sampling.py --model=DIR --prompts=FILE [--peer_python=PATH] [--json=FILE] [CONTESTANT ...]

Each contestant answers all prompts at temperature 1; the first one named is measured against each of the others in
turn, in processes of their own, one asleep while the other works. Tokens are those of the responses, up to and with the
one that ends them. `--caps=128,256,...` prints in their place how many decode steps batches to their slowest response
make against refilled slots, from the lengths of one run with the greatest cap.
"""

import argparse
import heapq
import json
import os
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from contest import Worker, is_runnable, machine, spread  # noqa: E402

from spin_jax.data.chat_format import chat_format  # noqa: E402
from spin_jax.data.sources import as_messages, load_prompts  # noqa: E402

SIZES = (4, 8, 16, 32, 64)
# name -> (file in contestants/, options). /N: responses decoded together; float32, or with -bf16 matmuls in bfloat16
# (transformers: weights and all else).
CONTESTANTS: dict[str, tuple[str, dict]] = {
    f"{who}/{size}{suffix}": (f"{who}_sample", {"batch_size": size} | options)
    for who, variants in {
        "spin_jax": {
            "": {"static": False},
            "-bf16": {"static": False, "compute_dtype": "bfloat16"},
            "-static": {"static": True},
        },
        "transformers": {
            "": {"cache_implementation": "dynamic"},
            "-bf16": {"cache_implementation": "dynamic", "dtype": "bfloat16"},
            "-static-cache": {"cache_implementation": "static"},
        },
        "ctranslate2": {"": {"dtype": "float32"}},
    }.items()
    for size in SIZES
    for suffix, options in variants.items()
}


def main() -> None:
    arguments = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # for the contestants, too
    settings = {"model": str(arguments.model), "max_new_tokens": max(arguments.caps or [arguments.cap])}
    settings |= read_prompts(arguments)
    widths = sorted(map(len, settings["prompts"]))
    quartiles = [widths[0], *map(round, statistics.quantiles(widths, n=4)), widths[-1]]
    report = {
        "machine": machine(),
        "cap": settings["max_new_tokens"],
        "prompts": len(widths),
        "their tokens": quartiles,
    }
    print(*(f"{name}: {value}" for name, value in report.items()), sep="\n", flush=True)
    first, *others = [name for name in arguments.contestants if is_runnable(name, arguments.peer_python)]
    with Worker(first, CONTESTANTS[first], settings, arguments) as ours:
        ours.first_pass(1)
        if arguments.caps:
            report["caps"] = by_cap(ours.first[0]["lengths"], CONTESTANTS[first][1]["batch_size"], arguments.caps)
        else:
            report["rounds"] = [one for name in others for one in duel(ours, name, arguments, settings)]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="*", metavar="CONTESTANT", help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="Hugging Face directory")
    parser.add_argument("--prompts", required=True, help="what `python -m spin_jax.generate --prompts` takes")
    parser.add_argument("--peer_python", help="python with requirements-trl.txt, for all but spin_jax")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, default=128, help="prompts, the file's first")
    parser.add_argument("--cap", type=int, default=256, help="tokens of a response at most")
    parser.add_argument("--rounds", type=int, default=2, help="times that both of two contestants answer all prompts")
    parser.add_argument("--caps", type=lambda text: sorted(map(int, text.split(","))), help="such as 128,256,512,1024")
    parser.add_argument("--json", type=pathlib.Path, help="all that was measured goes there")
    arguments = parser.parse_args()
    arguments.contestants = arguments.contestants or ["spin_jax/32", "spin_jax/32-static", "transformers/64"]
    if unknown := [name for name in arguments.contestants if name not in CONTESTANTS]:
        parser.error(f"no contestant is called {unknown[0]}: there are {', '.join(CONTESTANTS)}")
    return arguments


def read_prompts(arguments: argparse.Namespace) -> dict[str, list]:
    """The first prompts of the file as token ids, as a run would ask them, and the ids that end a response."""
    from transformers import AutoTokenizer

    chat = chat_format(AutoTokenizer.from_pretrained(arguments.model))
    prompts = load_prompts(arguments.prompts)[: arguments.count]
    if len(prompts) < arguments.count:
        sys.exit(f"{arguments.prompts} has {len(prompts)} prompts, not {arguments.count}: lower --count")
    tokens = [chat.generation_prompt(as_messages(prompt)).tolist() for prompt in prompts]
    return {"prompts": tokens, "stop_ids": list(chat.stop_ids)}


def duel(ours: Worker, name: str, arguments: argparse.Namespace, settings: dict) -> list[dict]:
    """All prompts by both, in turn; who begins changes from round to round. Prints each contestant's line."""
    rounds = []
    with Worker(name, CONTESTANTS[name], settings, arguments) as peer:
        if name.startswith("spin_jax/"):
            peer.first_pass(1)  # its programs are compiled
        for i in range(arguments.rounds):
            order = (ours, peer) if i % 2 == 0 else (peer, ours)
            rounds.append({one.name: one.step() | one.versions for one in order})
    for one in (ours.name, name):
        print(line(one, [answers[one] for answers in rounds]))
    ratios = [rate(answers[ours.name]) / rate(answers[name]) for answers in rounds]
    print(f"    {ours.name} makes {spread(ratios)} times the tokens a second of {name}", flush=True)
    return rounds


def rate(answer: dict) -> float:
    return answer["tokens"] / answer["seconds"]


def line(name: str, answers: list[dict]) -> str:
    def median(field: str) -> float:
        return statistics.median(answer.get(field, float("nan")) for answer in answers)

    return (
        f"{name:22} {spread([rate(answer) for answer in answers])} tokens/s, {median('seconds'):.0f} s "
        f"({median('cpu_seconds'):.0f} CPU s, others {median('others'):.2f} cores), {median('tokens'):.0f} tokens in "
        f"{median('steps'):.0f} steps, slots busy {median('before_tail'):.1%} before the tail, "
        f"{median('occupancy'):.1%} in all, {median('peak_rss') / 2**30:.1f} GiB"
    )


def by_cap(lengths: list[int], slots: int, caps: list[int]) -> list[dict]:
    """Decode steps under each cap, by the lengths of responses in the order that they are asked for: a response is a
    function of its prompt alone, and a smaller cap but cuts it."""
    rows = []
    for cap in caps:
        cut = [min(length, cap) for length in lengths]
        static = sum(max(cut[i : i + slots]) for i in range(0, len(cut), slots))
        refilled = steps_when_refilled(cut, slots)
        rows.append({"cap": cap, "mean length": statistics.mean(cut), "static": static, "refilled": refilled})
        print(
            f"cap {cap:5}: mean length {statistics.mean(cut):6.1f}, steps in batches of {slots} {static:6}, in "
            f"refilled slots {refilled:6}, ratio {static / refilled:.2f}"
        )
    return rows


def steps_when_refilled(lengths: list[int], slots: int) -> int:
    """Until the last response ends, when each takes the first slot that is free."""
    ends = [0] * slots
    for length in lengths:
        heapq.heappushpop(ends, ends[0] + length)
    return max(ends)


if __name__ == "__main__":
    main()
