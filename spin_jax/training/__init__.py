"""Training: optimizers, the step, the programs of a stage, and the loop. An optimizer is one function and one entry
here; `config.train.optimizer` and `config.sft.optimizer` name it."""

from spin_jax.registry import Registry

OPTIMIZERS: Registry = Registry(
    {"rmsprop": "spin_jax.training.optimizer:rmsprop", "adamw": "spin_jax.training.optimizer:adamw"}
)
