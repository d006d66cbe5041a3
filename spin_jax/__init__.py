"""SPIN (Self-Play Fine-Tuning, arXiv 2401.01335) in JAX/Flax.

The Python surface is `load`, `spin`, the `Model` that both return, and `answer`. Under them `Engine` samples, and
`Scorer` gives log-probs. The command lines are `python -m spin_jax.main` and `python -m spin_jax.generate`.
"""

import os
from typing import TYPE_CHECKING

# transformers advises to install torch, which nobody needs here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_EXPORTS = ("Engine", "Model", "Scorer", "answer", "load", "spin")
__all__ = ["Engine", "Model", "Scorer", "UserError", "answer", "load", "spin"]

from spin_jax.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from spin_jax.api import Engine, Model, Scorer, answer, load, spin


def __getattr__(name: str):
    """Import jax only when something that needs it is asked for, so that `spin_jax.main --help` stays quick."""
    if name in _EXPORTS:
        from spin_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'spin_jax' has no attribute {name!r}")
