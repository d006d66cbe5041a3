"""No download, no accelerator: a tiny Llama on a made task whose data distribution is known, so measures are exact.

    python -m spin_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

The task is in spin_jax/tasks/toy.py. 4,096 examples are so few that plain SFT soon overfits; SPIN starts
after five passes. How these settings were found, and the many where SPIN does nothing or harm: docs/quickstart.md.
Expected: the share of right answers (validity) rises by two to five points over the three iterations while the distance
to the data (kl_to_data) stays about where it was; continued SFT gains more.
"""

from spin_jax.config import base_config


def get_config():
    config = base_config()
    config.iterations = 3
    config.model.path = "toy:"
    config.model.compute_dtype = "float32"  # its figures shall not depend on the CPU
    config.model.attention = "plain"  # rows are of 64 tokens, and nothing is gained by cutting them into tiles
    config.data.train = "toy:"
    config.data.eval_rows = 128
    config.data.max_length = 16
    config.data.max_prompt_length = 10
    config.toy.train_rows = 4096  # few: SFT overfits them
    config.toy.hidden_size = 64
    config.toy.num_layers = 2
    config.sft.epochs = 5.0  # with ten, KL to the data on unseen prompts is higher already
    config.sft.learning_rate = 3e-3
    config.sft.control = True
    # of 1e-4, 3e-4, 1e-3 and 3e-3 the one that stays nearest to the data; the larger, the more right answers
    config.sft.control_learning_rate = 1e-4
    config.generate.max_new_tokens = 5  # three letters, the end, and one to spare
    config.generate.prompt_bucket = 16
    config.spin.beta = (5.0,)  # the paper's 0.1 lets this small model run away from its opponent at any useful step
    config.train.batch_size = 64
    config.train.epochs = 2.0
    config.train.learning_rate = (3e-4,)  # a tenth of SFT's
    config.train.row_length = 64  # four pairs
    config.train.length_multiple = 16
    config.train.checkpoint_every = 1000  # a stage takes seconds
    return config
