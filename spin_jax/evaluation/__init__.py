"""What a model is measured by. An evaluator is one file, and one entry here; `config.evaluate.evaluators` names it."""

from spin_jax.registry import Registry

EVALUATORS: Registry = Registry(
    {
        "rewards": "spin_jax.evaluation.rewards:rewards",
        "samples": "spin_jax.evaluation.samples:samples",
        "exact": "spin_jax.evaluation.exact:exact",
        "lm_eval": "spin_jax.evaluation.lm_eval:lm_eval",
        "mt_bench": "spin_jax.evaluation.mt_bench_answers:mt_bench",
    }
)
