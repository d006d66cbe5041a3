"""DPO of the paper's start on UltraFeedback's 62,000 preferences: the row "zephyr-7b-dpo-full" of its table.

    python -m spin_jax.main --config=configs/zephyr_7b_dpo.py --workdir=runs/zephyr-dpo

The logistic loss with the chosen response for the real one and the rejected one for the opponent's, the start as
reference. Settings are the alignment handbook's (zephyr-7b-beta, dpo/config_full.yaml), but for its cosine schedule:
ours is linear. Expected, the paper's table: average 61.31. Not run by us.
"""

import zephyr_7b


def get_config(arg: str = ""):
    config = zephyr_7b.get_config(arg)
    config.iterations = 1
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.split = "train_prefs"
    config.data.layout = "preference"
    config.data.max_rows = 0  # all
    config.data.template = "chat"
    config.data.max_length = 1024
    config.data.max_prompt_length = 512
    config.generate.source = "data"
    config.spin.beta = (0.01,)
    config.spin.previous_iterations = 0
    config.train.epochs = 1.0
    config.train.batch_size = 128
    config.train.optimizer = "adamw"
    config.train.learning_rate = (5e-7,)
    return config
