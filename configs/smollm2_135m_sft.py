"""Plain SFT from the start of configs/smollm2_135m.py, on the same rows: what the data alone give.

    python -m spin_jax.main --config=configs/smollm2_135m_sft.py --workdir=runs/smollm2-sft \
        --config.model.path=HuggingFaceTB/SmolLM2-135M-Instruct --config.data.train=FILE_OR_HUB_ID

--config.train.match_flops=runs/smollm2 gives each iteration the FLOPs of that SPIN run's.
"""

import smollm2_135m


def get_config():
    config = smollm2_135m.get_config()
    config.spin.loss = "sft"
    config.train.optimizer = "adamw"
    config.train.learning_rate = (2e-5,)  # the alignment handbook's for SFT; tune it as well as SPIN's
    return config
