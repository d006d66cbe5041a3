"""What a model answers to the held-out prompts: how long, how varied, and the answers themselves to read."""

import json
import logging
from collections.abc import Sequence

import numpy as np

from spin_jax.data.pairs import TokenIds
from spin_jax.evaluation.interface import Evaluator, Subject, needs_held_out
from spin_jax.runtime import multihost
from spin_jax.runtime.files import write_whole

FILE = "samples.jsonl"
SHOWN = 10  # answers in the log: what a person reads
LONGEST = 200  # characters of each there
# Of these orders the literature reports most: distinct-2 of arXiv 1510.03055, rep-4 as in arXiv 1908.04319.
DISTINCT, REPEATED = 2, 4

_LOG = logging.getLogger(__name__)


def distinct_ngrams(responses: Sequence[TokenIds], n: int) -> float:
    """Different n-grams of token ids over all n-grams, of all responses together: 1 where none comes twice; 0 where
    there are none."""
    found = [gram for response in responses for gram in _ngrams(response, n)]
    return len(set(found)) / max(1, len(found))


def repeated_ngrams(responses: Sequence[TokenIds], n: int) -> float:
    """The share of a response's n-grams of token ids that it had before, on average: near 1 in a loop. A response with
    no n-gram repeats none."""
    grams = [_ngrams(response, n) for response in responses]
    return float(np.mean([1 - len(set(own)) / max(1, len(own)) if own else 0.0 for own in grams]))


def _ngrams(response: TokenIds, n: int) -> list[tuple[int, ...]]:
    ids = [int(token) for token in response]
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def _measure(subject: Subject) -> dict[str, float]:
    """Sampled as the run samples; the policy of iteration t with the seeds of iteration t + 1, so that the answers are
    those that it would write as the next opponent."""
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
    """Every answer beside the real and the opponent's one in `samples.jsonl`, and the first few in the log."""
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
    """A prompt with its answers, a line each."""
    said = {"prompt": line["prompt"][-1]["content"], **{who: line[who] for who in ("real", "opponent", "policy")}}
    return f"row {line['row']}\n" + "\n".join(f"  {who:9}{_short(text)}" for who, text in said.items())


def _short(text: str) -> str:
    """In one line, and with no character that would move a terminal's cursor or turn its writing."""
    plain = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split())
    )
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 4] + " ..."


samples = Evaluator(_measure, needs_held_out, auto=True)
