"""Job of gpu.py: tokens per second of one sampler, with TinyLlama's shape and random weights in bfloat16.

Such weights say every token about equally often. So that responses end at different times, a part of the vocabulary
ends them: their lengths are geometric with a mean of about MEAN tokens.
"""

import tempfile

import job
import numpy as np
from contest import Worker

MEAN = 128


def main() -> None:
    flags = job.parse_flags("contestant")
    full = flags.size == "full"
    count, cap, slots = (512, 256, 256) if full else (8, 12, 4)
    model = job.shape(job.TRAININGS["1b"].hub_id, flags.size)
    prompts = [pair["prompt"] for pair in job.draw_pairs(count, model.vocab_size, flags.size)]
    stop_ids = np.random.default_rng(1).choice(model.vocab_size, max(1, model.vocab_size // MEAN), replace=False)
    options = {
        "spin_jax": {"batch_size": slots, "static": False, "compute_dtype": "bfloat16" if full else "float32"},
        "transformers": {"batch_size": slots, "cache_implementation": "dynamic"},
        "vllm": {},
    }[flags.contestant]
    if flags.contestant != "spin_jax":
        options |= {"dtype": "bfloat16", "device": "cuda" if flags.on_gpu else "cpu"}
    found = {"contestant": flags.contestant, "prompts": count, "cap": cap, "options": options}
    with tempfile.TemporaryDirectory() as directory:
        job.write_shape(model, directory)
        settings = {"model": directory, "prompts": prompts, "max_new_tokens": cap, "stop_ids": stop_ids.tolist()}
        contestant = (f"{flags.contestant}_sample", options)
        with Worker(f"{flags.contestant}/{slots}", contestant, settings, job.worker_arguments(flags)) as worker:
            job.write(flags, found | {"constants": worker.versions})
            worker.first_pass(1)  # compiles
            answer = worker.step()
    found |= {"constants": worker.versions, "tokens": answer["tokens"], "all_seconds": answer["seconds"]}
    found |= {name: answer[name] for name in ("steps", "occupancy") if name in answer}
    job.write(flags, found | {"tokens_per_second": answer["tokens"] / answer["seconds"]})


if __name__ == "__main__":
    main()
