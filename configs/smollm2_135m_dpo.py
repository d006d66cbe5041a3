"""DPO of SmolLM2-135M-Instruct on preferences: rows with a prompt, a chosen and a rejected response.

    python -m spin_jax.main --config=configs/smollm2_135m_dpo.py --workdir=runs/smollm2-dpo \
        --config.model.path=HuggingFaceTB/SmolLM2-135M-Instruct --config.data.train=PREFERENCES

The logistic loss with the chosen response for the real one and the rejected one for the opponent's, the start as
reference. With --config.iterations=2 the trained model becomes the reference of a second round.
"""

import smollm2_135m


def get_config():
    config = smollm2_135m.get_config()
    config.iterations = 1
    config.data.layout = "preference"
    config.generate.source = "data"
    config.train.optimizer = "adamw"
    return config
