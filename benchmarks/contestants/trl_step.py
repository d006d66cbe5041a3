"""trl's DPOTrainer as a contestant of train_step.py. With the logistic loss, DPO's objective is that of a SPIN step:
chosen is the real response, rejected the generated one.

Runs in an environment of its own (requirements-trl.txt). Options: `weights` ("float32" or "bfloat16"), `autocast` (to
bfloat16), `precompute` (the reference's log-probs, as trl stores them), `micro_batch` (pairs, the
others follow by accumulation; None is all), `compile` (torch.compile). For a GPU also `device` ("cuda"), `attention`
(transformers' name of it), `liger` (its kernels for the layers) and `lora_rank`. Of random weights trl would hash all
before it computes the reference's log-probs: they count as 0 instead, which costs the same.
"""

import pathlib
import tempfile

import datasets
import torch
import transformers
import trl
from parent import Parent
from trl.trainer import dpo_trainer


class Trainer(trl.DPOTrainer):
    """DPOTrainer on rows of token ids, as it is but for the tokenizing."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss)  # of a micro-batch, divided by their number
        return loss


class TrainerOfRandom(Trainer):
    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        zeros = [0.0] * len(dataset)
        return dataset.add_column("ref_chosen_logps", zeros).add_column("ref_rejected_logps", zeros)


class Clock(transformers.TrainerCallback):
    """From the first micro-batch to the update. Batches are collated before, which is not counted."""

    def __init__(self, parent: Parent, trainer: Trainer):
        self._parent, self._trainer = parent, trainer

    def on_step_begin(self, *args, **kwargs):
        self._trainer.losses = []
        self._parent.wait()

    def on_step_end(self, *args, **kwargs):
        peak = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        losses = self._trainer.losses
        logps = self._trainer._metrics["train"]["logps/chosen"][-len(losses) :]
        self._parent.done(loss=float(sum(losses)), real_logp=float(sum(logps) / len(logps)), peak_on_device=peak)


def main() -> None:
    parent = Parent()
    s = parent.settings
    rows = [
        {"prompt_ids": pair["prompt"], "chosen_ids": pair["real"], "rejected_ids": pair["generated"]}
        for batch in s["batches"]
        for pair in batch
    ]
    size = len(s["batches"][0])
    pairs = s["micro_batch"] or size
    tokenizer = transformers.AutoTokenizer.from_pretrained(s["model"])
    device, rank = s.get("device", "cpu"), s.get("lora_rank", 0)
    model, is_random = load(pathlib.Path(s["model"]), s["weights"], s.get("attention"), device)
    peft_config = None
    if rank:
        import peft

        peft_config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if is_random:
        dpo_trainer.hash_module = lambda _: ""
    with tempfile.TemporaryDirectory() as directory:
        arguments = trl.DPOConfig(
            output_dir=directory,
            per_device_train_batch_size=pairs,
            gradient_accumulation_steps=size // pairs,
            precompute_ref_log_probs=s["precompute"],
            precompute_ref_batch_size=pairs,
            bf16=s["autocast"],
            torch_compile=s["compile"],
            gradient_checkpointing=False,
            optim="rmsprop",
            learning_rate=s["learning_rate"],
            lr_scheduler_type="constant",
            max_grad_norm=s["clip_norm"],
            beta=s["beta"],
            max_length=None,
            num_train_epochs=10**6,
            train_sampling_strategy="sequential",
            use_cpu=device == "cpu",
            use_liger_kernel=s.get("liger", False),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10**6,
        )
        trainer = (TrainerOfRandom if is_random else Trainer)(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.add_callback(Clock(parent, trainer))
        versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
        parent.ready(**versions, device=torch.cuda.get_device_name() if device == "cuda" else "cpu")
        trainer.train()


def load(directory: pathlib.Path, dtype: str, attention: str | None, device: str):
    """(model, whether its weights are random)"""
    if any(directory.glob("*.safetensors")):
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), False
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    return model, True


if __name__ == "__main__":
    main()
