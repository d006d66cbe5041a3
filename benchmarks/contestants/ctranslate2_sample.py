"""CTranslate2 as a contestant of sampling.py: a C++ engine for inference, which batches prompts of like length itself.

Options: `batch_size` and `dtype`, as CTranslate2 calls it.
"""

import os
import tempfile

import ctranslate2
import transformers
from parent import Parent


def main() -> None:
    parent = Parent()
    s = parent.settings
    tokenizer = transformers.AutoTokenizer.from_pretrained(s["model"])
    prompts = [tokenizer.convert_ids_to_tokens(tokens) for tokens in s["prompts"]]
    with tempfile.TemporaryDirectory() as directory:
        converted = os.path.join(directory, "model")
        ctranslate2.converters.TransformersConverter(s["model"]).convert(converted)
        threads = int(os.environ["OMP_NUM_THREADS"])
        generator = ctranslate2.Generator(converted, compute_type=s["dtype"], intra_threads=threads)
    settings = {
        "sampling_topk": 0,  # all tokens
        "sampling_temperature": 1.0,
        "max_batch_size": s["batch_size"],
        "end_token": s["stop_ids"],
        "return_end_token": True,
        "include_prompt_in_result": False,
    }
    generator.generate_batch(prompts[:2], max_length=4, **settings)  # whatever is loaded late
    parent.ready(ctranslate2=ctranslate2.__version__, transformers=transformers.__version__)
    seed = 0
    while True:
        parent.wait()
        ctranslate2.set_random_seed(seed)
        answers = generator.generate_batch(prompts, max_length=s["max_new_tokens"], **settings)
        parent.done(tokens=sum(len(answer.sequences_ids[0]) for answer in answers))
        seed += 1


if __name__ == "__main__":
    main()
