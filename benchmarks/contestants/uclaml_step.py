"""The step of the authors' released code (github.com/uclaml/SPIN) as a contestant of train_step.py.

A re-implementation, not their program: what their `SPINTrainer` computes, written anew on today's torch and
transformers. Real and generated rows are concatenated and padded to the batch's longest; policy and opponent both run
in every step; logits of all positions are made, in float32, and so are their log-softmax and the mean of the logits
that they log. Left out: printing eight tensors a step, and the Trainer around it.

Runs in the environment of requirements-trl.txt. Options: `weights` ("float32" or "bfloat16"), `autocast`.
"""

import torch
import torch.nn.functional as F
import transformers
from parent import Parent

IGNORED = -100


def collate(pairs: list[dict]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels [2 pairs, longest]: the real responses' rows, then the generated ones'."""
    rows = [(pair["prompt"], pair[kind]) for kind in ("real", "generated") for pair in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(tokens, IGNORED)
    mask = torch.zeros_like(tokens)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[i, :end] = torch.tensor(prompt + response)
        labels[i, len(prompt) : end] = tokens[i, len(prompt) : end]
        mask[i, :end] = 1
    return tokens, mask, labels


def forward(model, tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(y|x) of each row, the logits of all positions in float32)."""
    logits = model(tokens, attention_mask=mask).logits.to(torch.float32)
    targets = labels[:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (logps * (targets != IGNORED)).sum(-1), logits


def main() -> None:
    parent = Parent()
    s = parent.settings
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, opponent = (load(s["model"], dtype=s["weights"]) for _ in range(2))
    policy.config.use_cache = opponent.config.use_cache = False
    policy.train()
    opponent.eval()
    batches = [collate(pairs) for pairs in s["batches"]]
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=s["learning_rate"])
    parent.ready(torch=torch.__version__, transformers=transformers.__version__)
    step = 0
    while True:
        parent.wait()
        batch = batches[step % len(batches)]
        with torch.autocast("cpu", torch.bfloat16, enabled=s["autocast"]):
            logps, logits = forward(policy, *batch)
            with torch.no_grad():
                reference, _ = forward(opponent, *batch)
            real, generated = (logps - reference).chunk(2)
            loss = -F.logsigmoid(s["beta"] * (real - generated)).mean()
            [part.detach().mean() for part in logits.chunk(2)]  # their log's logits/real and logits/generated
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), s["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        parent.done(loss=float(loss.detach()), real_logp=float(logps.detach().chunk(2)[0].mean()))
        step += 1


if __name__ == "__main__":
    main()
