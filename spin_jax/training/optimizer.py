"""The optimizer and its learning rates."""

import math

import optax

from spin_jax.training import OPTIMIZERS


def warmup_steps(steps: int, warmup_ratio: float) -> int:
    """Steps of linear warm-up: ceil(warmup_ratio * steps), as in Hugging Face's Trainer."""
    return math.ceil(warmup_ratio * steps)


def learning_rate_schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear from 0 to `peak` over the first ceil(warmup_ratio * steps) steps, then linear to 0 at `steps` (Hugging
    Face's "linear")."""
    warmup = warmup_steps(steps, warmup_ratio)
    decay = optax.linear_schedule(peak, 0.0, steps - warmup)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(
    name: str, schedule: optax.Schedule, clip_norm: float, weight_decay: float
) -> optax.GradientTransformation:
    """The optimizer of that name in OPTIMIZERS, after clipping the gradient's global norm."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), OPTIMIZERS[name](schedule, weight_decay))


def rmsprop(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """The paper's RMSProp as torch computes it: decay 0.99, eps 1e-8 outside the root. The config refuses decay."""
    del weight_decay
    scale = optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False)
    return optax.chain(scale, optax.scale_by_learning_rate(schedule))


def adamw(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) with optax's defaults, which are torch's but for the decay."""
    return optax.adamw(schedule, weight_decay=weight_decay)
