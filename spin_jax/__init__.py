"""SPIN (Self-Play Fine-Tuning, arXiv 2401.01335) in JAX/Flax.

The Python surface is `load`, `spin`, the `Model` that both return, and `answer`. Under them `Engine` samples, and
`Scorer` gives log-probs. The command lines are `python -m spin_jax.main` and `python -m spin_jax.generate`.
"""

import os

from etils import epy

from spin_jax.errors import UserError

# transformers advises to install torch, which nobody needs here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Imported when it is asked for, since it imports jax: `spin_jax.main --help` stays quick.
with epy.lazy_api_imports(globals()):
    from spin_jax.api import Engine, Model, Scorer, answer, load, spin
