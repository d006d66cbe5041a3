"""MT-Bench (arXiv 2306.05685): its questions, a model's answers to them, and what a judge's scores come to.

All files are as FastChat has them (github.com/lm-sys/FastChat, fastchat/llm_judge), so that its own programs read them:

    DATA/judge_prompts.jsonl                       FastChat's llm_judge/data, as it is
    DATA/mt_bench/question.jsonl                   with the follow-up question, the second turn
    DATA/mt_bench/reference_answer/gpt-4.jsonl
    OUT/model_answer/MODEL.jsonl                   a line a question
    OUT/model_judgment/JUDGE_single.jsonl          a line a judgment, which `evaluation.judge` asks for
    OUT/model_judgment/JUDGE_pair.jsonl
"""

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from spin_jax.data.chat_format import ChatFormat
from spin_jax.data.rows import Mistakes, make_all, read_rows
from spin_jax.data.sources import Message
from spin_jax.errors import UserError
from spin_jax.runtime.files import expand, write_whole

QUESTIONS = "mt_bench/question.jsonl"
REFERENCES = "mt_bench/reference_answer/gpt-4.jsonl"
PROMPTS = "judge_prompts.jsonl"
# What FastChat samples with: a temperature for each category, which says how free an answer may be ...
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
TEMPERATURES |= {"stem": 0.1, "humanities": 0.1}
OTHERS = 0.7  # of a category that it does not know
# ... and what it leaves to `generate` of transformers, which takes the 50 most likely tokens.
SAMPLING: dict[str, object] = {"top_k": 50, "top_p": 1.0, "min_new_tokens": 0, "stop_strings": (), "responses": 1}
NO_RATING = -1  # the score of a reply that has none, which FastChat leaves out of its means


class Question(NamedTuple):
    """A question with its follow-ups, the user's turns."""

    id: int
    category: str
    turns: tuple[str, ...]


class Turn(NamedTuple):
    """A model's answer in one turn; `tokens` with the one that ends it, unless it is truncated."""

    text: str
    tokens: int
    truncated: bool


# ---- files


def read_questions(data: epath.PathLike) -> list[Question]:
    """The questions of a copy of FastChat's llm_judge/data.

    Raises:
        UserError: they are not there, or not such.
    """
    rows = read_records(expand(data) / QUESTIONS, question_id=int, category=str, turns=list)
    if not rows:
        raise UserError(f"{expand(data) / QUESTIONS}: no questions: copy or download it again")
    return [Question(row["question_id"], row["category"], tuple(row["turns"])) for row in rows]


def read_records(file: epath.Path, **kinds: type) -> list[dict[str, Any]]:
    """The objects of a JSONL file, checked to have these fields.

    Raises:
        UserError: the file is not there, or lines are not such; it names them.
    """
    if not file.exists():
        theirs = str(file).endswith((QUESTIONS, REFERENCES, PROMPTS))
        hint = "give a copy of fastchat/llm_judge/data of github.com/lm-sys/FastChat" if theirs else "answer first"
        raise UserError(f"{file}: not found; {hint}")
    found, mistakes = [], Mistakes()
    for place, row in read_rows(str(file), ""):
        if isinstance(row, dict):
            wrong = [name for name, kind in kinds.items() if not isinstance(row.get(name), kind)]
            error = UserError(f"{wrong[0]} must be {kinds[wrong[0]].__name__}") if wrong else None
        else:
            error = row if isinstance(row, UserError) else UserError("no JSON object")
        mistakes.add(place, error) if error else found.append(row)
    mistakes.refuse()
    return found


def answers_file(out: epath.PathLike, model: str) -> epath.Path:
    """Where a model's answers go: FastChat's name."""
    return expand(out) / "model_answer" / f"{model}.jsonl"


def read_answers(file: epath.Path, questions: Sequence[Question]) -> dict[int, tuple[str, ...]]:
    """The turns of a model's, or the reference's, answer to each question, by its id.

    Raises:
        UserError: the file is not there or not such, or an answer is missing.
    """
    rows = read_records(file, question_id=int, choices=list)
    found = {row["question_id"]: tuple(map(str, row["choices"][0]["turns"])) for row in rows if row["choices"]}
    if missing := [one.id for one in questions if len(found.get(one.id, ())) < len(one.turns)]:
        raise UserError(f"{file}: has no whole answer to {len(missing)} questions, the first {missing[0]}: answer anew")
    return found


def write_answers(
    file: epath.Path, model: str, questions: Sequence[Question], answers: Sequence[Sequence[Turn]]
) -> None:
    """A line for each question, with the fields of FastChat's gen_model_answer.py."""
    lines = [
        {
            "question_id": question.id,
            "answer_id": uuid.uuid4().hex,
            "model_id": model,
            "choices": [{"index": 0, "turns": [turn.text for turn in turns]}],
            "tstamp": time.time(),
        }
        for question, turns in zip(questions, answers, strict=True)
    ]
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))


# ---- answers


def answer(
    questions: Sequence[Question], chat: ChatFormat, sample: Callable[..., Sequence], max_new_tokens: int
) -> list[list[Turn]]:
    """A model's answer to each turn of each question, after its own answers to the turns before, whose spaces at both
    ends are dropped, as FastChat does.

    All questions of one temperature are sampled in one call. An answer depends on (weights, seed, turn, position of its
    question) alone.

    Args:
        chat: writes the prompts, and reads the answers.
        sample: (token ids of prompts by the position of their question, turn, fields of `config.generate`) -> a
            `generation.response_files.Response` to each.

    Raises:
        UserError: the chat template does not take the turns.
    """
    answers: list[list[Turn]] = [[] for _ in questions]
    for turn in range(max(len(one.turns) for one in questions)):
        asked = [i for i, one in enumerate(questions) if turn < len(one.turns)]
        messages = [_messages(questions[i].turns[: turn + 1], answers[i]) for i in asked]
        prompts = dict(zip(asked, make_all(chat.generation_prompt, messages, "MT-Bench question "), strict=True))
        temperatures = {i: TEMPERATURES.get(questions[i].category, OTHERS) for i in asked}
        for temperature in sorted(set(temperatures.values())):
            alike = {i: prompts[i] for i in asked if temperatures[i] == temperature}
            fields = SAMPLING | {"temperature": temperature, "max_new_tokens": max_new_tokens}
            for one in sample(alike, turn, **fields):
                text = chat.codec.decode(one.tokens).strip()
                answers[one.row].append(Turn(text, len(one.tokens), one.truncated))
    return answers


def _messages(asked: Sequence[str], answered: Sequence[Turn]) -> list[Message]:
    """User and assistant in turns, a user last."""
    messages: list[Message] = []
    for i, text in enumerate(asked):
        messages.append({"role": "user", "content": text})
        if i < len(answered):
            messages.append({"role": "assistant", "content": answered[i].text})
    return messages


# ---- scores


def mean_and_error(values: Mapping[tuple[int, int], float]) -> tuple[float | None, float | None]:
    """The mean of values, by (question id, turn), and its standard error over questions.

    A question's turns are one cluster (arXiv 2411.00640): with S_q their sum, n_q their number, n the questions and m
    the mean, the error is sqrt(n / (n - 1) sum_q (S_q - n_q m)^2) / sum_q n_q. Where all questions have as many turns,
    that is the standard deviation of their means over sqrt(n). None for nothing, or one question.
    """
    if not values:
        return None, None
    ids = sorted({question for question, _ in values})
    of_questions = [[value for (question, _), value in values.items() if question == one] for one in ids]
    sums, counts = (np.array([measure(one) for one in of_questions], float) for measure in (sum, len))
    mean, n = sums.sum() / counts.sum(), len(ids)
    if n == 1:
        return float(mean), None
    return float(mean), float(np.sqrt(n / (n - 1) * np.sum((sums - counts * mean) ** 2)) / counts.sum())


def score_table(questions: Sequence[Question], judgments: Iterable[Mapping], models: Sequence[str]) -> list[dict]:
    """Rows of a table of `reports.summary`: each model's mean rating by category and turn, overall with its standard
    error, and its difference to the first model on what was rated of both, with the paired standard error."""
    ratings: dict[str, dict[tuple[int, int], float]] = {model: {} for model in models}
    for one in judgments:
        if one["model"] in ratings and one["score"] != NO_RATING:
            ratings[one["model"]][one["question_id"], one["turn"]] = one["score"]
    of_category: dict[str, set[int]] = {}
    for question in questions:
        of_category.setdefault(question.category, set()).add(question.id)
    rows = []
    for model in models:
        for name, turns in (("1", (1,)), ("2", (2,)), ("both", (1, 2))):
            rated = {key: score for key, score in ratings[model].items() if key[1] in turns}
            row: dict[str, object] = {"model": model, "turn": name}
            for category, ids in of_category.items():
                row[category] = mean_and_error({key: score for key, score in rated.items() if key[0] in ids})[0]
            row["all"], row["all_stderr"] = mean_and_error(rated)
            if len(models) > 1:
                first = ratings[models[0]]
                ahead = {key: score - first[key] for key, score in rated.items() if key in first}
                difference = mean_and_error(ahead) if model != models[0] else (None, None)
                row[f"minus {models[0]}"], row[f"minus {models[0]}_stderr"] = difference
            rows.append(row)
    return rows


def outcome(judgment: Mapping) -> float | None:
    """1 where model_1 won, 0 where model_2 did, 1/2 for a tie, which is also where the winner changed with the order of
    the two answers; None where a reply named none."""
    winners = (judgment["g1_winner"], judgment["g2_winner"])
    if "error" in winners:
        return None
    return {("model_1", "model_1"): 1.0, ("model_2", "model_2"): 0.0}.get(winners, 0.5)


def win_table(judgments: Iterable[Mapping], models: Sequence[str]) -> list[dict]:
    """Rows of a table: how often each model won against the first one, with standard errors over questions. `half ties`
    counts a tie as half a win: FastChat's win_rate_adjusted."""
    outcomes: dict[str, dict[tuple[int, int], float]] = {model: {} for model in models[1:]}
    for one in judgments:
        if one["model_1"] in outcomes and one["model_2"] == models[0] and (value := outcome(one)) is not None:
            outcomes[one["model_1"]][one["question_id"], one["turn"]] = value
    rows = []
    for model, found in outcomes.items():
        row: dict[str, object] = {"model": model, "against": models[0]}
        row |= {
            name: sum(x == value for x in found.values()) for name, value in (("won", 1), ("tied", 0.5), ("lost", 0))
        }
        row["win rate"], row["win rate_stderr"] = mean_and_error({key: float(x == 1) for key, x in found.items()})
        row["half ties"], row["half ties_stderr"] = mean_and_error(found)
        rows.append(row)
    return rows
