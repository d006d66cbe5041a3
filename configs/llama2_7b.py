"""Llama-2-7B: supervised fine-tuning on UltraChat first, since there is no SFT model of it, then SPIN as in the paper.

    python -m spin_jax.main --config=configs/llama2_7b.py[:SLICE]

The tokenizer has no chat template, so the paper's pair of templates serves for both stages. Not run by us.
"""

from spin_jax.config import base_config
from spin_jax.devices.accelerators import use_slice


def get_config(arg: str = ""):
    config = base_config()
    config.iterations = 3  # the fourth gains 0.19 points in the paper
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.data.train = "HuggingFaceH4/ultrachat_200k"
    config.data.split = "train_sft"
    config.data.max_rows = 50_000
    config.data.eval_rows = 512
    config.data.turn = "first"
    config.data.template = "paper"
    config.data.max_length = 1024
    config.sft.epochs = 1.0  # further epochs gain under 1% (the paper, figure 6)
    config.sft.learning_rate = 2e-5
    config.train.learning_rate = (5e-7, 5e-7, 1e-7)
    use_slice(config, arg)
    return config
