"""What a model is measured by. An evaluator is one file, and one entry here; `config.evaluate.evaluators` names it."""

from spin_jax.registry import Registry

EVALUATORS: Registry = Registry(
    {
        "held_out": "spin_jax.evaluation.rewards:held_out",
        "samples": "spin_jax.evaluation.samples:samples",
        "exact": "spin_jax.evaluation.exact:exact",
        "mt_bench": "spin_jax.evaluation.mt_bench_answers:mt_bench",
    }
)
