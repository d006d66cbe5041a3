"""SFT on the opponent's own responses, in SPIN's loop: the control that tells self-play from self-training.

    python -m spin_jax.main --config=configs/smollm2_135m_ssd.py --workdir=runs/smollm2-ssd \
        --config.model.path=HuggingFaceTB/SmolLM2-135M-Instruct --config.data.train=FILE_OR_HUB_ID

Simple self-distillation (arXiv 2604.01193). Loss and temperature differ from configs/smollm2_135m.py;
--config.train.match_flops=runs/smollm2 gives each iteration the FLOPs of that run's.
"""

import smollm2_135m


def get_config():
    config = smollm2_135m.get_config()
    config.spin.loss = "ssd"
    config.generate.temperature = 0.7  # at 1 there is nothing to learn; not the paper's value
    return config
