"""How many steps a training stage takes, and which pairs each of them."""

import math

import numpy as np

from spin_jax.errors import UserError
from spin_jax.training.optimizer import warmup_steps


def num_steps(rows: int, epochs: float, batch_size: int, what: str = "--config.train.epochs") -> int:
    """Optimizer steps in `epochs` passes over `rows`; only what fills no batch at the very end is left out.

    Args:
        what: the field that holds `epochs`, for the message.

    Raises:
        UserError: not even one batch comes together.
    """
    steps = math.floor(rows * epochs / batch_size + 1e-9)
    if not steps:
        raise UserError(
            f"{rows} rows x {epochs:g} epochs do not fill one batch of {batch_size}: lower --config.train.batch_size, "
            f"or raise {what}"
        )
    return steps


def check_warmup(steps: int, warmup_ratio: float, what: str = "--config.train.epochs") -> None:
    """Refuse a schedule that ends before its warm-up does: next to nothing would be trained.

    Raises:
        UserError: one line with the fields to change.
    """
    if steps <= warmup_steps(steps, warmup_ratio):
        raise UserError(
            f"{steps} step(s) of training are all warm-up: raise {what}, or lower --config.train.batch_size or "
            "--config.train.warmup_ratio"
        )


def batch_order(rows: int, batch_size: int, seed: int, steps: int) -> np.ndarray:
    """Which of `rows` each of `steps` steps takes, [steps, batch_size]: an endless row of shuffles, one an epoch.

    A step's are a function of (rows, batch_size, seed, step) alone: a resumed run goes on with the same rows, whatever
    it was that stopped it.
    """
    epochs = math.ceil(steps * batch_size / rows)
    shuffles = [np.random.default_rng((seed, epoch)).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(shuffles)[: steps * batch_size].reshape(steps, batch_size)
