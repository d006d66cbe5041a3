"""Writes trl_losses.json beside it: what trl's `DPOTrainer` makes of given log-probs, for tests that run without torch.

    python tests/golden/make_trl_losses.py

needs torch and trl. `DPOTrainer._compute_loss` is asked itself, for one pair of responses after the other: in the place
of a model is a function that returns log-probs of tokens. One pair at a time, `aot` (which trl sorts over a batch) is
the logistic loss with smoothed labels, and `sft` (a mean over a batch's tokens) is a mean over one response's.
"""

import collections
import json
import pathlib
import types

import accelerate
import torch
import trl
from trl.trainer.dpo_trainer import DPOTrainer

HERE = pathlib.Path(__file__).parent
LENGTHS = ((4, 9), (1, 3), (9, 1), (6, 6), (2, 8), (40, 25))  # tokens of the real and the generated response
# Our name, trl's losses with their weights, and our settings.
LOSSES = (
    ("logistic", {"sigmoid": 1.0}, {}),
    ("hinge", {"hinge": 1.0}, {}),
    ("cdpo", {"aot": 1.0}, {"label_smoothing": 0.1}),
    ("robust", {"robust": 1.0}, {"label_smoothing": 0.1}),
    ("ipo_per_token", {"ipo": 1.0}, {}),
    ("logistic_per_token", {"sigmoid_norm": 1.0}, {}),
    ("sppo_hard", {"sppo_hard": 1.0}, {}),
    ("space", {"bco_pair": 1.0}, {}),
    ("logistic", {"sigmoid": 1.0, "sft": 0.3}, {"nll_weight": 0.3}),
    ("ipo_per_token", {"ipo": 1.0, "sft": 2.0}, {"nll_weight": 2.0}),
)
BETAS = (0.1, 1.0)


def trl_loss(losses: dict[str, float], beta: float, label_smoothing: float, logps: list, reference: list) -> float:
    """The loss of one pair: log-probs of the tokens of its two responses, [tokens] each, and the reference's sums."""
    trainer = DPOTrainer.__new__(DPOTrainer)
    vars(trainer).update(
        model=types.SimpleNamespace(training=True),
        accelerator=accelerate.Accelerator(cpu=True),
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    longest = max(map(len, logps))
    # A prompt of one token, whose prediction is the first of the response.
    mask = torch.tensor([[0] + [1] * len(of) + [0] * (longest - len(of)) for of in logps])
    log_probs = torch.stack([torch.nn.functional.pad(of, (0, longest - len(of))) for of in logps])
    blank = torch.zeros_like(log_probs)
    outputs = types.SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference[0][None], "ref_rejected_logps": reference[1][None]}
    return float(trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False))


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        return -3 * torch.rand(length, generator=generator, dtype=torch.float64)

    policy = [[draw(length) for length in of_pair] for of_pair in LENGTHS]
    # Log-ratios of either sign, of some nats a response.
    reference = [[of.sum() + 2 * draw(1)[0] + 3 for of in of_pair] for of_pair in policy]
    found = []
    for name, losses, settings in LOSSES:
        for beta in BETAS:
            smoothing = settings.get("label_smoothing", 0.0)
            values = [trl_loss(losses, beta, smoothing, *one) for one in zip(policy, reference, strict=True)]
            found.append({"loss": name, "trl": losses, "settings": settings | {"beta": beta}, "values": values})
    content = {
        "trl": trl.__version__,
        "lengths": LENGTHS,
        "policy": [[float(of.sum()) for of in of_pair] for of_pair in policy],
        "reference": [[float(of) for of in of_pair] for of_pair in reference],
        "losses": found,
    }
    (HERE / "trl_losses.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
