"""SPIN followed by DPO: the last model of configs/smollm2_135m.py learns from preferences.

    python -m spin_jax.main --config=configs/smollm2_135m_spin_dpo.py --workdir=runs/smollm2-spin-dpo \
        --config.data.train=PREFERENCES

The start is what configs/smollm2_135m.py leaves in runs/smollm2; name another with --config.model.path.
"""

import smollm2_135m_dpo


def get_config():
    config = smollm2_135m_dpo.get_config()
    config.model.path = "runs/smollm2/iteration_1/model"
    config.train.epochs = 2.0  # the paper's
    return config
