"""What a training step minimises. An objective is one file, and one entry here; `config.spin.loss` names it."""

from spin_jax.registry import Registry

OBJECTIVES: Registry = Registry(
    {
        "logistic": "spin_jax.objectives.spin:logistic",
        "hinge": "spin_jax.objectives.spin:hinge",
        "exponential": "spin_jax.objectives.spin:exponential",
        "correlation": "spin_jax.objectives.spin:correlation",
        "sft": "spin_jax.objectives.sft:sft",
    }
)
