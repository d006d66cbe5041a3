"""No download, no accelerator: a tiny Llama on a made task whose data distribution is known, so that all is measured exactly.

    python -m spin_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from spin_jax.config import base_config


def get_config():
    config = base_config()
    config.iterations = 3
    config.model.path = "toy:"
    config.data.train = "toy:"
    config.data.eval_rows = 128
    config.data.max_length = 16
    config.data.max_prompt_length = 10
    config.toy.train_rows = 4096
    config.toy.hidden_size = 64
    config.toy.num_layers = 2
    config.sft.epochs = 10.0
    config.sft.learning_rate = 3e-3
    config.sft.control = True
    config.generate.batch_size = 256
    config.generate.max_new_tokens = 5
    config.generate.prompt_bucket = 16
    config.spin.beta = (1.0,)
    config.train.batch_size = 64
    config.train.epochs = 2.0
    config.train.learning_rate = (1e-4,)
    config.train.length_multiple = 0
    config.train.checkpoint_every = 1000
    return config
