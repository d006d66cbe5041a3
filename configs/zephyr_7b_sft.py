"""The paper's control "SFT for one more epoch": what the data alone give to configs/zephyr_7b.py's start.

    python -m spin_jax.main --config=configs/zephyr_7b_sft.py --workdir=runs/zephyr-sft

All of UltraChat, each row's first exchange, with the settings that the start was fine-tuned with (the alignment
handbook's: AdamW, 2e-5, 128 rows a step). Expected, the paper's table: average 58.14 before it, 57.23 after it.
Continued SFT for the FLOPs of each iteration is --config.sft.control=True in a SPIN run. Not run by us.
"""

import zephyr_7b


def get_config(arg: str = ""):
    config = zephyr_7b.get_config(arg)
    config.iterations = 1
    config.data.max_rows = 0  # all
    config.spin.loss = "sft"
    config.spin.previous_iterations = 0
    config.train.epochs = 1.0
    config.train.batch_size = 128
    config.train.optimizer = "adamw"
    config.train.learning_rate = (2e-5,)
    return config
