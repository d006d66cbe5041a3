"""A judge of answers to MT-Bench: a model behind any OpenAI-compatible endpoint, asked with FastChat's own prompts.

A single judgment rates one model's answer from 1 to 10. A pairwise one compares two models' answers, in both orders,
since judges prefer a place. Judgments are written as they come, in FastChat's layout; what is there is not asked again.
It needs no jax, and of the `openai` package, which the extra "judge" brings, retries, backoff and timeouts.
"""

import concurrent.futures
import dataclasses
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import openai
from etils import epath
from tqdm import tqdm

from spin_jax.errors import UserError
from spin_jax.evaluation.mt_bench import NO_RATING, PROMPTS, REFERENCES, Question, read_answers, read_records
from spin_jax.runtime.files import expand, first_line, write_whole, writing

REFERENCED = ("math", "reasoning", "coding")  # categories that are judged beside a reference answer, as in FastChat
MAX_TOKENS = 2048  # of a reply: FastChat's
ASKED = 3  # times at most, until a reply has a rating
ASKED_AGAIN_AT = 0.7  # temperature: at 0, FastChat's, a judge would say the same again
RETRIES = 8  # of a request: the client waits 0.5 s, then twice as long each time to 8 s, or what the endpoint says
TIMEOUT = 600  # seconds of a request: the client's own
BYTES_PER_TOKEN = 3  # fewer than texts have: MT-Bench's own have 3.7 with a tokenizer of 49,152 tokens
REFUSED = "$ERROR$"  # FastChat's reply of an endpoint that gave none

_NAMES = {  # of the prompts in judge_prompts.jsonl, by mode and by whether they show a reference answer
    ("single", False): "single-v1",
    ("single", True): "single-math-v1",
    ("pairwise", False): "pair-v2",
    ("pairwise", True): "pair-math-v1",
}
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))  # FastChat's, the second if need be
_WINNERS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
_LOG = logging.getLogger(__name__)

Verdict = TypeVar("Verdict")


def rating(reply: str) -> float | None:
    """The first rating in a reply; None where it has none from 1 to 10."""
    found = next((match for pattern in _RATINGS if (match := pattern.search(reply))), None)
    if not found or not 1 <= float(found[1]) <= 10:
        return None
    return int(found[1]) if found[1].isdigit() else float(found[1])


def winner(reply: str) -> str | None:
    """ "A", "B" or "tie", by the first of FastChat's marks that a reply has anywhere; None where it has none."""
    return next((name for mark, name in _WINNERS.items() if mark in reply), None)


# ---- what is asked


class Match(NamedTuple):
    """A judgment to be made.

    Attributes:
        models: whose answers are judged; two for a pairwise judgment.
        prompt: its name in judge_prompts.jsonl.
        system: the judge's system turn.
        asked: its user turn; two for a pairwise judgment, with the answers in either order.
    """

    question: int
    turn: int
    models: tuple[str, ...]
    prompt: str
    system: str
    asked: tuple[str, ...]


def make_matches(
    data: epath.PathLike,
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[int, Sequence[str]]],
    mode: str,
) -> list[Match]:
    """All judgments of a mode, "single" or "pairwise": of each model, or of each but the first against the first.

    Args:
        data: a copy of FastChat's llm_judge/data.
        answers: model -> question id -> the text of each turn.

    Raises:
        UserError: prompts or reference answers are not there.
    """
    data, (first, *others) = expand(data), answers
    prompts = {
        row["name"]: row for row in read_records(data / PROMPTS, name=str, system_prompt=str, prompt_template=str)
    }
    referenced = [one for one in questions if one.category in REFERENCED]
    references = read_answers(data / REFERENCES, referenced) if referenced else {}
    matches = []
    for question in questions:
        for turn in range(1, min(len(question.turns), 2) + 1):
            name = _NAMES[mode, question.category in REFERENCED] + ("-multi-turn" if turn == 2 else "")
            if name not in prompts:
                raise UserError(f"{data / PROMPTS}: has no prompt {name}: take FastChat's as it is")
            fields = _numbered("ref_answer", references.get(question.id, ()))
            fields |= {"question": question.turns[0], **_numbered("question", question.turns)}
            for models in [(one, first) for one in others] if mode == "pairwise" else [(one,) for one in answers]:
                texts = [answers[model][question.id] for model in models]
                orders = (texts, texts[::-1]) if len(models) == 2 else (texts,)
                template = prompts[name]["prompt_template"]
                asked = tuple(template.format(**fields, **_shown(order)) for order in orders)
                matches.append(Match(question.id, turn, models, name, prompts[name]["system_prompt"], asked))
    return matches


def _numbered(name: str, texts: Sequence[str]) -> dict[str, str]:
    return {f"{name}_{i}": text for i, text in enumerate(texts, start=1)}


def _shown(answers: Sequence[Sequence[str]]) -> dict[str, str]:
    """The fields of one answer, or of answers A and B, in a prompt's template."""
    fields = {}
    for name, turns in zip(("answer",) if len(answers) == 1 else ("answer_a", "answer_b"), answers, strict=True):
        fields |= {name: turns[0], **_numbered(name, turns)}
    return fields


class Cost(NamedTuple):
    """What judgments take at most, if every first reply has a verdict."""

    calls: int
    tokens_in: int
    tokens_out: int

    @classmethod
    def of(cls, matches: Sequence[Match]) -> "Cost":
        asked = [match.system + text for match in matches for text in match.asked]
        size = sum(-(-len(text.encode()) // BYTES_PER_TOKEN) for text in asked)
        return cls(len(asked), size, MAX_TOKENS * len(asked))

    def told(self, prices: tuple[float, float] | None) -> str:
        """One line; `prices` are per million tokens in and out."""
        line = (
            f"{self.calls:,} calls, at most {self.tokens_in:,} tokens of prompts (a token for {BYTES_PER_TOKEN} bytes) "
            f"and {self.tokens_out:,} of replies ({MAX_TOKENS:,} each)"
        )
        if prices:
            line += f": at most {(self.tokens_in * prices[0] + self.tokens_out * prices[1]) / 1e6:,.2f} at these prices"
        return f"{line}; a reply without a verdict is asked for again, {ASKED} times in all"


# ---- asking


@dataclasses.dataclass
class Endpoint:
    """A model at a URL that speaks the chat completions of OpenAI; its functions may be called by many threads.

    Attributes:
        key: sent to it, and never in what is written, raised or logged; "" where it asks for none.
        heard: whether it has ever answered: before, a request that it refuses is the user's mistake.
    """

    url: str
    model: str
    key: str = dataclasses.field(repr=False)
    heard: bool = False

    def __post_init__(self):
        self._client = openai.OpenAI(
            base_url=self.url, api_key=self.key or "none", max_retries=RETRIES, timeout=TIMEOUT
        )

    def ask(self, system: str, text: str, read: Callable[[str], Verdict | None]) -> tuple[str, Verdict | None]:
        """A reply, and the verdict that is read in it; None where none of `ASKED` replies had one.

        Raises:
            UserError: the endpoint cannot be reached, refuses the key or the model, or is none.
        """
        replies: list[str] = []
        for temperature in (0.0, *[ASKED_AGAIN_AT] * (ASKED - 1)):
            reply = self._reply(system, text, temperature)
            if reply is None:
                continue
            replies.append(reply)
            if (verdict := read(reply)) is not None or reply == REFUSED:
                return reply, verdict
        if not replies:
            raise UserError(f"{self.url}: what it answers is no chat completion: is --judge_url right?")
        return replies[-1], None

    def _reply(self, system: str, text: str, temperature: float) -> str | None:
        """What it says; None where that is no chat completion."""
        messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        try:
            completion: Any = self._client.chat.completions.create(
                model=self.model, messages=messages, n=1, temperature=temperature, max_tokens=MAX_TOKENS
            )
        except openai.BadRequestError as error:  # such as a prompt that is too long for it
            if not self.heard:
                raise UserError(self._told(error)) from None
            _LOG.warning("%s", self._told(error))
            return REFUSED
        except openai.APIResponseValidationError:
            return None
        except openai.OpenAIError as error:
            raise UserError(f"{self._told(error)}; the same command again asks what is missing") from None
        except ValueError:  # no JSON
            return None
        try:
            content = completion.choices[0].message.content or ""
        except (AttributeError, IndexError, TypeError):
            return None
        self.heard = True
        return self._hide(content)

    def _told(self, error: Exception) -> str:
        return f"{self.url}: {first_line(Exception(self._hide(str(error))))}"  # hidden before it is cut

    def _hide(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text


def judge(endpoint: Endpoint, match: Match) -> dict[str, Any]:
    """A line of the judgments file, with the fields of FastChat's gen_judgment.py; raises as `Endpoint.ask`."""
    row: dict[str, Any] = {"question_id": match.question}
    by = {"judge": [endpoint.model, match.prompt]}
    if len(match.models) == 1:
        reply, score = endpoint.ask(match.system, match.asked[0], rating)
        row |= {"model": match.models[0], **by, "user_prompt": match.asked[0], "judgment": reply}
        row["score"] = NO_RATING if score is None else score
    else:
        (first, a), (second, b) = (endpoint.ask(match.system, text, winner) for text in match.asked)
        row |= {"model_1": match.models[0], "model_2": match.models[1]}
        row["g1_winner"] = {"A": "model_1", "B": "model_2", "tie": "tie"}.get(a or "", "error")
        row["g2_winner"] = {"A": "model_2", "B": "model_1", "tie": "tie"}.get(b or "", "error")
        row |= {**by, "g1_user_prompt": match.asked[0], "g1_judgment": first}
        row |= {"g2_user_prompt": match.asked[1], "g2_judgment": second}
    return row | {"turn": match.turn, "tstamp": time.time()}


def judge_all(endpoint: Endpoint, matches: Sequence[Match], file: epath.Path, parallel: int) -> None:
    """Make judgments, `parallel` at a time, and append each to a file as it comes.

    Raises:
        UserError: of the first that failed; those that were under way then are there.
    """
    failed = threading.Event()

    def made(match: Match) -> dict[str, Any] | None:
        try:
            return None if failed.is_set() else judge(endpoint, match)
        except Exception:
            failed.set()
            raise

    mistakes = []
    with writing(file), concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines, tqdm(total=len(matches), desc="judge", unit=" judgments") as bar:
            for future in concurrent.futures.as_completed([pool.submit(made, match) for match in matches]):
                if error := future.exception():
                    mistakes.append(error)
                elif row := future.result():
                    lines.write(json.dumps(row) + "\n")
                    lines.flush()
                    bar.update()
    if mistakes:
        raise mistakes[0]


# ---- what was judged


def judgment_file(out: epath.PathLike, judge_model: str, mode: str) -> epath.Path:
    """Where judgments go: FastChat's names."""
    name = judge_model.replace("/", "__")
    return expand(out) / "model_judgment" / f"{name}_{'pair' if mode == 'pairwise' else mode}.jsonl"


def read_judgments(file: epath.Path, matches: Sequence[Match]) -> tuple[list[dict[str, Any]], list[Match]]:
    """The judgments that a file has of these matches, and the matches that it has none of. A line that was cut when a
    start was killed is taken out of the file.

    Raises:
        UserError: it has judgments of other answers of the same models.
    """
    if file.exists() and not (content := file.read_text()).endswith("\n"):
        write_whole(file, content[: content.rfind("\n") + 1])
    rows = read_records(file, question_id=int, turn=int, judge=list) if file.exists() else []
    there = {_key(row): row for row in rows}
    found, missing = [], []
    for match in matches:
        row = there.get((match.question, match.turn, match.models))
        if row is None:
            missing.append(match)
        elif (*match.asked, match.prompt) == (*_asked(row), row["judge"][1]):
            found.append(row)
        else:
            raise UserError(
                f"{file}: question {match.question} was judged with another answer of {' or '.join(match.models)}: "
                "delete the file, or give the answers another name"
            )
    return found, missing


def _key(row: Mapping[str, Any]) -> tuple[int, int, tuple[str, ...]]:
    models = (row["model"],) if "model" in row else (row.get("model_1", ""), row.get("model_2", ""))
    return row["question_id"], row["turn"], models


def _asked(row: Mapping[str, Any]) -> list[Any]:
    return [row[name] for name in ("user_prompt", "g1_user_prompt", "g2_user_prompt") if name in row]


def without_verdict(judgments: Sequence[Mapping[str, Any]]) -> int:
    """How many of them are left out of the results."""
    return sum(
        row.get("score") == NO_RATING or "error" in (row.get("g1_winner"), row.get("g2_winner")) for row in judgments
    )
