"""What the log-probs of held-out pairs say of a policy: its rewards, and its loss on the human responses."""

from collections.abc import Sequence

import numpy as np

from spin_jax.config import at_iteration
from spin_jax.data.pairs import Pair
from spin_jax.evaluation.interface import Evaluator, Subject, needs_held_out
from spin_jax.objectives.margin_losses import rewards as rewards_of
from spin_jax.runtime import metric_writer, multihost
from spin_jax.runtime.files import write_whole

FILE = "rewards.jsonl"


def pair_rewards(policy_logps: np.ndarray, opponent_logps: np.ndarray, beta: float) -> np.ndarray:
    """Rewards (equation 4.6) of pairs of a real and a generated response, [pairs, 2], from such log-probs."""
    return np.asarray(rewards_of(policy_logps.astype(np.float64), opponent_logps.astype(np.float64), beta))


def held_out_rewards(of_pairs: np.ndarray) -> dict[str, float]:
    """What the summary says of held-out pairs with such rewards, [pairs, 2]."""
    real, generated = of_pairs.T
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
        of_pairs = pair_rewards(logps, subject.opponent_logps(), beta)
        multihost.on_process_zero(lambda: _keep(subject, of_pairs))
        found |= held_out_rewards(of_pairs)
    return found


def _keep(subject: Subject, of_pairs: np.ndarray) -> None:
    """The rewards of each pair in `rewards.jsonl`, under the names of `metrics.jsonl`: which ones a policy gets wrong,
    and how they are spread, is not in a mean."""
    lines = []
    for pair, (real, generated) in zip(subject.held_out, of_pairs, strict=True):
        lengths = dict(zip(("lengths/real", "lengths/generated"), map(len, pair.responses), strict=True))
        line = {"row": pair.row, "rewards/real": real, "rewards/generated": generated, **lengths}
        lines.append(metric_writer.to_json(line) + "\n")
    write_whole(subject.directory / FILE, "".join(lines))


rewards = Evaluator(_measure, needs_held_out, auto=True)
