"""TinyLlama-1.1B-Chat on one accelerator: the smallest model of the paper's family with a chat template of its own.

    python -m spin_jax.main --config=configs/tinyllama_1b.py[:SLICE]

1.1e9 params with f32 masters and RMSProp state take 9 GB, gradients 4 GB. Not run by us.
"""

from spin_jax.config import base_config
from spin_jax.devices.accelerators import use_slice


def get_config(arg: str = ""):
    config = base_config()
    config.iterations = 3
    config.model.path = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    # One device holds a whole micro-batch: 32 rows x 256 positions x 32,000 logits x 4 bytes is 1 GB.
    config.model.logits_chunk = 256
    config.data.train = "HuggingFaceH4/ultrachat_200k"
    config.data.split = "train_sft"
    config.data.max_rows = 10_000
    config.data.eval_rows = 256
    config.data.turn = "first"
    config.train.learning_rate = (5e-7, 5e-7, 1e-7)
    use_slice(config, arg)
    return config
