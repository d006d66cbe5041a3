"""SPIN followed by DPO: the last model of configs/zephyr_7b.py learns from UltraFeedback's preferences.

    python -m spin_jax.main --config=configs/zephyr_7b_spin_dpo.py --workdir=runs/zephyr-spin-dpo

Two epochs, as in the paper's table, whose average grows from 63.16 to 64.05. The start is what
`python -m spin_jax.main --config=configs/zephyr_7b.py --workdir=runs/zephyr` leaves; name another with
--config.model.path. Not run by us.
"""

import zephyr_7b_dpo


def get_config(arg: str = ""):
    config = zephyr_7b_dpo.get_config(arg)
    config.model.path = "runs/zephyr/iteration_3/model"
    config.model.revision = ""
    config.train.epochs = 2.0
    return config
