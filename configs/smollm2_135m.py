"""SmolLM2-135M-Instruct on a CPU or one small accelerator: the whole job at a size that a laptop can carry.

    python -m spin_jax.main --config=configs/smollm2_135m.py \
        --config.model.path=HuggingFaceTB/SmolLM2-135M-Instruct --config.data.train=FILE_OR_HUB_ID
"""

from spin_jax.config import base_config


def get_config():
    config = base_config()
    config.iterations = 2
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.max_rows = 256
    config.data.eval_rows = 64
    config.data.max_length = 256
    config.data.max_prompt_length = 128
    config.generate.max_new_tokens = 64
    # 256 pairs give 16 steps an epoch: few enough pairs that 64 a step would hardly move the policy
    config.train.batch_size = 16
    config.train.epochs = 1.0
    config.train.learning_rate = (2e-6,)  # 4x the paper's: 50x smaller a model, 50x fewer steps
    config.train.length_multiple = 64
    config.train.checkpoint_every = 8
    return config
