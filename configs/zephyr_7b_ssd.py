"""The control that tells self-play from self-training: SFT on the opponent's own responses, in SPIN's loop.

    python -m spin_jax.main --config=configs/zephyr_7b_ssd.py --workdir=runs/zephyr-ssd

Simple self-distillation (arXiv 2604.01193), with the data, responses, steps and learning rate of configs/zephyr_7b.py:
what differs is loss and temperature. --config.train.match_flops=runs/zephyr gives each iteration the FLOPs of that
run's, which is about twice as many steps. Not run by us.
"""

import zephyr_7b


def get_config(arg: str = ""):
    config = zephyr_7b.get_config(arg)
    config.spin.loss = "ssd"
    config.generate.temperature = 0.7  # at 1 there is nothing to learn; not the paper's value
    return config
