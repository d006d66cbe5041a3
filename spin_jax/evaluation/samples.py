"""Sample the model's answers to held-out prompts: measure their length and variety, and keep them to be read."""

import json
import logging
from collections.abc import Sequence

import numpy as np

from spin_jax.data.pairs import TokenIds
from spin_jax.evaluation.interface import Evaluator, Subject, needs_held_out
from spin_jax.runtime import multihost
from spin_jax.runtime.files import write_whole

FILE = "samples.jsonl"
SHOWN = 10  # answers in the log, as many as a person reads
LONGEST = 200  # characters of an answer in the log
# The orders that the literature mostly reports: distinct-2 (arXiv 1510.03055) and rep-4 (arXiv 1908.04319).
DISTINCT, REPEATED = 2, 4

_LOG = logging.getLogger(__name__)


def distinct_ngrams(responses: Sequence[TokenIds], n: int) -> float:
    """Return the share of distinct n-grams of token ids among all n-grams of all responses: 1 if none occurs twice. It
    is 0 if there are none."""
    found = [gram for response in responses for gram in _ngrams(response, n)]
    return len(set(found)) / max(1, len(found))


def repeated_ngrams(responses: Sequence[TokenIds], n: int) -> float:
    """Return the mean share of n-grams of token ids that repeat an earlier one of the same response: near 1 in a loop.
    A response without n-grams counts as 0."""
    grams = [_ngrams(response, n) for response in responses]
    return float(np.mean([1 - len(set(own)) / max(1, len(own)) if own else 0.0 for own in grams]))


def _ngrams(response: TokenIds, n: int) -> list[tuple[int, ...]]:
    ids = [int(token) for token in response]
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def _measure(subject: Subject) -> dict[str, float]:
    """Sample as the run does. Use the seeds of iteration t + 1 for the policy of iteration t: the answers are then the
    ones that it would write as the next opponent."""
    answered = (subject.iteration if subject.iteration is not None else -1) + 1
    responses = subject.generate(subject.held_out_prompts, answered, responses=1)
    tokens = [response.tokens for response in responses]
    multihost.on_process_zero(lambda: _keep(subject, responses))
    return {
        "samples/tokens": float(np.mean([len(ids) for ids in tokens])),
        "samples/truncated": float(np.mean([response.truncated for response in responses])),
        f"samples/distinct_{DISTINCT}": distinct_ngrams(tokens, DISTINCT),
        f"samples/repeated_{REPEATED}": repeated_ngrams(tokens, REPEATED),
    }


def _keep(subject: Subject, responses: Sequence) -> None:
    """Write every answer, beside the real one and the opponent's, to `samples.jsonl`, and log the first few."""
    decode, opponents = subject.chat.codec.decode, {}
    for pair in subject.held_out:
        opponents.setdefault(pair.row, decode(pair.responses[1]))
    lines = []
    for example, response in zip(subject.held_out_examples, responses, strict=True):
        texts = {"real": example.response, "opponent": opponents[example.row], "policy": decode(response.tokens)}
        truncated = {"truncated": response.truncated}
        lines.append({"row": example.row, "prompt": list(example.prompt), **texts, **truncated})
    write_whole(subject.directory / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    shown = [_shown(line) for line in lines[:SHOWN]]
    _LOG.info("%s answers held-out prompts (all in %s):\n%s", subject.name, subject.directory / FILE, "\n".join(shown))


def _shown(line: dict) -> str:
    """Format a prompt and its answers, a line each."""
    said = {"prompt": line["prompt"][-1]["content"], **{who: line[who] for who in ("real", "opponent", "policy")}}
    return f"row {line['row']}\n" + "\n".join(f"  {who:9}{_short(text)}" for who, text in said.items())


def _short(text: str) -> str:
    """Shorten a text to one line. Replace characters that would move a terminal's cursor or change its direction."""
    plain = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split())
    )
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 4] + " ..."


samples = Evaluator(_measure, needs_held_out, auto=True)
