"""What the log-probs of held-out pairs say of a policy: its rewards, and its loss on the human responses."""

from collections.abc import Sequence

import numpy as np

from spin_jax.config import at_iteration
from spin_jax.data.pairs import Pair
from spin_jax.evaluation.interface import Evaluator, Subject, needs_held_out
from spin_jax.objectives.margin_losses import rewards as rewards_of


def held_out_rewards(policy_logps: np.ndarray, opponent_logps: np.ndarray, beta: float) -> dict[str, float]:
    """Rewards (equation 4.6) of held-out pairs of a real and a generated response, from log-probs [pairs, 2]."""
    real, generated = np.asarray(rewards_of(policy_logps.astype(np.float64), opponent_logps.astype(np.float64), beta)).T
    return {
        "held_out/rewards/accuracy": float(np.mean(real > generated)),
        "held_out/rewards/margin": float(np.mean(real - generated)),
        "held_out/rewards/real": float(np.mean(real)),
        "held_out/rewards/generated": float(np.mean(generated)),
    }


def nats_per_token(pairs: Sequence[Pair], logps: np.ndarray) -> float:
    """A model's mean loss on the human responses as a plain language model, from its log-probs [pairs, Y]."""
    return -float(logps[:, 0].sum(dtype=np.float64)) / sum(len(pair.responses[0]) for pair in pairs)


def _measure(subject: Subject) -> dict[str, float]:
    """Rewards are against the opponent of the iteration, which wrote the generated responses."""
    logps = subject.held_out_logps()
    found = {"held_out/nats_per_token": nats_per_token(subject.held_out, logps)}
    if subject.opponent_logps and subject.iteration is not None:
        beta = at_iteration(subject.config.spin.beta, subject.iteration)
        found |= held_out_rewards(logps, subject.opponent_logps(), beta)
    return found


rewards = Evaluator(_measure, needs_held_out, auto=True)
