"""Job of gpu.py: SPIN steps of one model by one contestant, ours or trl's, on the same pairs, with random weights.

Ours: bfloat16 matmuls on float32 weights, the opponent's log-probs stored, packed rows. trl's, each as fast as it goes:
bfloat16 weights (with low-rank updates autocast), stored log-probs, its fused LM head, liger's kernels and
flash-attention where they are there, pairs of like length padded together.
"""

import statistics
import tempfile
import time

import job
from contest import Worker

from spin_jax.data.packing import forward_flops
from spin_jax.data.pairs import Pair

STEPS, SECONDS = 10, 15.0  # timed, and after how long no other is begun
OPTIMIZATION = {"beta": 0.1, "learning_rate": 5e-7, "clip_norm": 1.0}


def main() -> None:
    flags = job.parse_flags("model", "contestant")
    training = job.TRAININGS[flags.model]
    pairs = training.pairs if flags.size == "full" else 4
    model = job.shape(training.hub_id, flags.size)
    batch = job.draw_pairs(pairs, model.vocab_size, flags.size)
    passes = 2 if training.lora_rank else 3  # as programs.TrainingSpec counts them
    flops = passes * sum(forward_flops(model, as_pair(pair)) for pair in batch)
    tokens = sum(len(ids) for pair in batch for ids in pair.values())
    found = {"contestant": flags.contestant, "pairs": pairs, "tokens": tokens, "model_tflop": flops / 1e12}
    job.write(flags, found)
    options = ours(training, flags.size) if flags.contestant == "spin_jax" else trl(training, flags)
    with tempfile.TemporaryDirectory() as directory:
        job.write_shape(model, directory)
        settings = OPTIMIZATION | {"model": directory, "batches": [batch]}
        name, file = f"{flags.contestant}/{flags.model}", f"{flags.contestant}_step"
        with Worker(name, (file, options), settings, job.worker_arguments(flags)) as worker:
            job.write(flags, found | {"options": options, "constants": worker.versions})
            begin = time.perf_counter()
            worker.first_pass(2)
            found |= {"options": options, "constants": worker.versions, "start_seconds": time.perf_counter() - begin}
            steps = timed(worker, STEPS if flags.size == "full" else 2)
    peak = job.peak_flops(worker.versions["device"], flags.on_gpu)
    job.write(flags, found | measures(steps, pairs, flops, peak))


def ours(training: job.Training, size: str) -> dict:
    return {
        "compute_dtype": "bfloat16",
        "attention": "auto",
        "opponent": "stored",
        "padded": False,
        # As long as the longest pair: shorter rows are less full, in longer ones more is computed that nobody sees.
        "row_length": 1536,
        "length_multiple": 64 if size == "full" else 16,
        # Every matmul's result is kept, but not attention's.
        "remat": "projections",
        "logits_chunk": 0,
        "micro_batches": training.micro_batches,
        "lora_rank": training.lora_rank,
    }


def trl(training: job.Training, flags) -> dict:
    import gpu

    flash = flags.on_gpu and gpu.has(flags.peer_python, "flash_attn")
    return {
        "weights": "bfloat16",
        "autocast": bool(training.lora_rank),
        "precompute": True,
        "micro_batch": training.peer_pairs if flags.size == "full" else 2,
        "compile": False,
        "device": "cuda" if flags.on_gpu else "cpu",
        "attention": "flash_attention_2" if flash else "sdpa",
        "liger": flags.on_gpu and gpu.has(flags.peer_python, "liger_kernel"),
        "lora_rank": training.lora_rank,
    }


def timed(worker: Worker, most: int) -> list[dict]:
    begin, steps = time.perf_counter(), []
    while len(steps) < most and time.perf_counter() - begin < SECONDS:
        steps.append(worker.step())
    return steps


def measures(steps: list[dict], pairs: int, flops: float, peak: float | None) -> dict:
    """Medians over steps; the MFU is model FLOPs over what the card could do in bfloat16."""
    seconds = [step["seconds"] for step in steps]
    median = statistics.median(seconds)
    found = {"step_seconds": median, "all_seconds": seconds, "pairs_per_second": pairs / median}
    found |= {"model_tflop_per_second": flops / median / 1e12, "loss": steps[-1]["loss"]}
    if memory := steps[-1]["peak_on_device"]:
        found["peak_gib"] = memory / 2**30
    if peak:
        found["mfu"] = flops / median / peak
    return found


def as_pair(ids: dict[str, list[int]]) -> Pair:
    return Pair(0, 0, ids["prompt"], (ids["real"], ids["generated"]), (False, False))


if __name__ == "__main__":
    main()
