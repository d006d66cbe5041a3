"""vllm as a contestant of gpu.py's sampling, on random weights: given all prompts at once, it batches them itself.

Option: `dtype`.
"""

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch  # noqa: E402
import vllm  # noqa: E402
from parent import Parent  # noqa: E402


def main() -> None:
    parent = Parent()
    s = parent.settings
    longest = max(map(len, s["prompts"])) + s["max_new_tokens"]
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": s["dtype"], "max_model_len": longest}
    model = vllm.LLM(model=s["model"], **options)
    prompts = [{"prompt_token_ids": tokens} for tokens in s["prompts"]]
    parent.ready(torch=torch.__version__, vllm=vllm.__version__)
    while True:
        parent.wait()
        settings = vllm.SamplingParams(
            temperature=1.0,
            max_tokens=s["max_new_tokens"],
            stop_token_ids=s["stop_ids"],
            ignore_eos=True,
            detokenize=False,
        )
        answers = model.generate(prompts, settings, use_tqdm=False)
        parent.done(tokens=sum(len(answer.outputs[0].token_ids) for answer in answers))


if __name__ == "__main__":
    main()
