"""What the log-probs of held-out pairs say of a policy."""

from collections.abc import Sequence

import numpy as np

from spin_jax.data.pairs import Pair
from spin_jax.objectives.margin_losses import rewards

# ---- measures


def held_out_rewards(policy_logps: np.ndarray, opponent_logps: np.ndarray, beta: float) -> dict[str, float]:
    """Rewards (equation 4.6) of held-out pairs of a real and a generated response, from log-probs [pairs, 2]."""
    real, generated = np.asarray(rewards(policy_logps.astype(np.float64), opponent_logps.astype(np.float64), beta)).T
    return {
        "held_out/rewards/accuracy": float(np.mean(real > generated)),
        "held_out/rewards/margin": float(np.mean(real - generated)),
        "held_out/rewards/real": float(np.mean(real)),
        "held_out/rewards/generated": float(np.mean(generated)),
    }


def nats_per_token(pairs: Sequence[Pair], logps: np.ndarray) -> float:
    """A model's mean loss on the human responses as a plain language model, from its log-probs [pairs, Y]."""
    return -float(logps[:, 0].sum(dtype=np.float64)) / sum(len(pair.responses[0]) for pair in pairs)
