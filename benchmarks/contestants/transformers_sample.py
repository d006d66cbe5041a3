"""`transformers`' generate as a contestant of sampling.py: batches of prompts of like length, left-padded.

Options: `batch_size` and `cache_implementation`: "dynamic", which is transformers' own choice
and made anew, one longer, in every step, or "static". Where they are given, `dtype` and `device`.
"""

import pathlib

import torch
import transformers
from parent import Parent


def main() -> None:
    parent = Parent()
    s = parent.settings
    directory, device = pathlib.Path(s["model"]), s.get("device", "cpu")
    dtype = getattr(torch, s.get("dtype", "float32"))
    if any(directory.glob("*.safetensors")):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    else:
        config = transformers.AutoConfig.from_pretrained(directory)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    prompts = sorted(s["prompts"], key=lambda tokens: -len(tokens))
    size, stop_ids = s["batch_size"], s["stop_ids"]

    def answer(batch: list[list[int]], max_new_tokens: int) -> tuple[int, int]:
        """(tokens of the responses, decode steps)"""
        width = max(map(len, batch))
        padding = [width - len(tokens) for tokens in batch]
        drawn = model.generate(
            torch.tensor([[0] * pad + tokens for pad, tokens in zip(padding, batch, strict=True)], device=device),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            cache_implementation=s["cache_implementation"],
            eos_token_id=stop_ids,
            pad_token_id=0,
        )[:, width:].cpu()
        ends = torch.isin(drawn, torch.tensor(stop_ids))
        lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, drawn.shape[1])
        return int(lengths.sum()), drawn.shape[1]

    answer(prompts[-2:], 4)  # whatever is loaded late
    parent.ready(torch=torch.__version__, transformers=transformers.__version__)
    seed = 0
    while True:
        parent.wait()
        torch.manual_seed(seed)
        answers = [answer(prompts[i : i + size], s["max_new_tokens"]) for i in range(0, len(prompts), size)]
        tokens, steps = map(sum, zip(*answers, strict=True))
        parent.done(tokens=tokens, steps=steps)
        seed += 1


if __name__ == "__main__":
    main()
