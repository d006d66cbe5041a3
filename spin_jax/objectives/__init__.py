"""What a training step minimises. An objective is one file, and one entry here; `config.spin.loss` names it."""

from spin_jax.registry import Registry

OBJECTIVES: Registry = Registry(
    {
        "logistic": "spin_jax.objectives.spin:logistic",
        "hinge": "spin_jax.objectives.spin:hinge",
        "exponential": "spin_jax.objectives.spin:exponential",
        "correlation": "spin_jax.objectives.spin:correlation",
        "cdpo": "spin_jax.objectives.cdpo:cdpo",
        "robust": "spin_jax.objectives.robust:robust",
        "ipo": "spin_jax.objectives.ipo:ipo",
        "ipo_per_token": "spin_jax.objectives.ipo:ipo_per_token",
        "logistic_per_token": "spin_jax.objectives.per_token:logistic",
        "sppo_hard": "spin_jax.objectives.sppo:sppo_hard",
        "space": "spin_jax.objectives.space:space",
        "tspin": "spin_jax.objectives.tspin:tspin",
        "sft": "spin_jax.objectives.sft:sft",
        "ssd": "spin_jax.objectives.ssd:ssd",
    }
)
