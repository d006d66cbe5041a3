"""The lm-evaluation-harness's tasks here and with its own `hf` model: seconds, on the same questions and weights.

    python benchmarks/harness.py --model=DIR --include_path=DIR [--peer_python=PATH] [--json=FILE] [CONTESTANT ...]

The first contestant is measured against each of the others, in processes of their own; both answer a block of questions
in turn, and one is asleep while the other works. A block before each task is not timed: programs are compiled in it.
Tasks are of --include_path, with a score `acc_norm`.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys

from contest import Worker, is_runnable, machine, spread

# name -> (file in contestants/, options). hf/N: requests computed together.
CONTESTANTS: dict[str, tuple[str, dict]] = {
    "spin_jax/f32": ("spin_jax_harness", {"dtype": "float32"}),
    "spin_jax/bf16": ("spin_jax_harness", {"dtype": "bfloat16"}),
    **{f"hf/{size}": ("hf_harness", {"dtype": "float32", "batch_size": size}) for size in (1, 2, 4, 8, 16, 32)},
    **{f"hf/{size}-bf16": ("hf_harness", {"dtype": "bfloat16", "batch_size": size}) for size in (1, 2, 4, 8, 16, 32)},
}


def main() -> None:
    arguments = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # for the contestants, too
    print(f"machine: {machine()}", flush=True)
    report: dict = {"machine": machine(), "tasks": arguments.tasks, "duels": []}
    first, *others = [name for name in arguments.contestants if is_runnable(name, arguments.peer_python)]
    for task, shots in arguments.tasks:
        size, numbers = arguments.block, range(arguments.questions)
        blocks = [{"task": task, "shots": shots, "questions": list(numbers[i : i + size])} for i in numbers[::size]]
        settings = {"model": str(arguments.model), "include_path": str(arguments.include_path), "blocks": blocks}
        with Worker(first, CONTESTANTS[first], settings, arguments) as ours:
            ours.first_pass(len(blocks))
            for name in others:
                report["duels"].append({"task": task, "shots": shots} | duel(ours, name, arguments, settings))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="*", metavar="CONTESTANT", help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="Hugging Face directory")
    parser.add_argument("--include_path", type=pathlib.Path, required=True, help="a directory with the tasks' files")
    parser.add_argument("--tasks", type=task_list, default="hellaswag_local:10,arc_challenge_local:25")
    parser.add_argument("--peer_python", help="python with torch, transformers, accelerate and lm-eval, for hf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=100, help="of each task, the first")
    parser.add_argument("--block", type=int, default=20, help="questions that a contestant answers in one turn")
    parser.add_argument("--json", type=pathlib.Path, help="all that was measured goes there")
    arguments = parser.parse_args()
    arguments.contestants = arguments.contestants or ["spin_jax/f32", "hf/1", "hf/4", "hf/16"]
    if unknown := [name for name in arguments.contestants if name not in CONTESTANTS]:
        parser.error(f"no contestant is called {unknown[0]}: there are {', '.join(CONTESTANTS)}")
    return arguments


def task_list(text: str) -> list[tuple[str, int]]:
    return [(name, int(shots)) for name, _, shots in (one.partition(":") for one in text.split(","))]


def duel(ours: Worker, name: str, arguments: argparse.Namespace, settings: dict) -> dict:
    """All blocks by both, in turn; who begins changes from block to block. Prints each contestant's line."""
    answers: dict[str, list[dict]] = {ours.name: [], name: []}
    with Worker(name, CONTESTANTS[name], settings, arguments) as peer:
        for i in range(len(settings["blocks"])):
            for one in (ours, peer) if i % 2 == 0 else (peer, ours):
                answers[one.name].append(one.step())
        versions = {one.name: one.versions for one in (ours, peer)}
    task, shots = settings["blocks"][0]["task"], settings["blocks"][0]["shots"]
    for one, of_one in answers.items():
        seconds, score = (
            sum(answer["seconds"] for answer in of_one),
            statistics.fmean(answer["score"] for answer in of_one),
        )
        others = statistics.fmean(answer["others"] for answer in of_one)
        peak = max(answer["peak_rss"] for answer in of_one) / 2**30
        print(
            f"{task} ({shots}), {arguments.questions} questions: {one:14} {seconds:.0f} s, acc_norm {score:.3f} "
            f"(others {others:.2f} cores, {peak:.1f} GiB)"
        )
    pairs = zip(answers[ours.name], answers[name], strict=True)
    ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in pairs]
    print(f"    {name} takes {spread(ratios)} times as long as {ours.name}", flush=True)
    return {"answers": answers, "versions": versions, "ratios": ratios}


if __name__ == "__main__":
    sys.exit(main())
