"""Answers to MT-Bench: of a model of a run, beside its result, and of any model on its own. A judge is asked later, by
`python -m spin_jax.mt_bench`, as it costs money."""

import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath

from spin_jax import checkpoints
from spin_jax.config import Config
from spin_jax.data.chat_format import load_chat
from spin_jax.data.pairs import TokenIds
from spin_jax.errors import UserError
from spin_jax.evaluation.interface import Evaluator, Subject
from spin_jax.evaluation.loaded_model import load_model
from spin_jax.evaluation.mt_bench import Question, Turn, answer, answers_file, read_questions, write_answers
from spin_jax.runtime import multihost, out_of_memory

_LOG = logging.getLogger(__name__)


def _tries(config: Config) -> list[str]:
    fewer = f"--config.evaluate.mt_bench_tokens={config.evaluate.mt_bench_tokens // 2}"
    return ["--config.generate.batch_size=8", "more devices", fewer]


@out_of_memory.tells("answer", _tries)
def answer_alone(config: Config, out: epath.PathLike, name: str) -> None:
    """Answer with the model at `config.model.path`, in the tokenizer's chat template, and write `answers_file`.

    Raises:
        UserError: questions, model or chat template are not there, or the answers are already.
    """
    file, settings = answers_file(out, name), config.evaluate
    questions = multihost.on_process_zero(lambda: read_questions(settings.mt_bench))
    if multihost.on_process_zero(file.exists):
        raise UserError(f"{file} is there already: delete it, or give another --model_id")
    path, revision = config.model.path, config.model.revision or None
    source = multihost.on_each_process(lambda: pathlib.Path(checkpoints.resolve(path, revision)))
    size = multihost.on_each_process(lambda: checkpoints.read_config(source)).vocab_size
    chat = multihost.on_each_process(lambda: load_chat(source, "chat", vocab_size=size))
    loaded = load_model(config)
    longest = loaded.model.max_position_embeddings

    def sample(prompts: Mapping[int, TokenIds], turn: int, **fields: object) -> list:
        length = max(map(len, prompts.values())) + settings.mt_bench_tokens
        if length > longest:
            _LOG.warning(
                "turn %d: prompts and answers have up to %d tokens, and the model reads %d: what comes after is beyond "
                "what it was trained on; lower --config.evaluate.mt_bench_tokens",
                *(turn + 1, length, longest),
            )
        return loaded.sample(prompts, turn, chat.stop_ids, **fields)

    answers = answer(questions, chat, sample, settings.mt_bench_tokens)
    multihost.on_process_zero(lambda: write_answers(file, name, questions, answers))
    told = ", ".join(f"{what} {value:.4g}" for what, value in _measures(answers).items())
    _LOG.info("%s: %d answers; %s", file, len(questions), told)


# ---- the evaluator


def _measure(subject: Subject) -> dict[str, float]:
    """The answers of a run's model are `model_answer/MODEL.jsonl` in its directory."""
    settings, name = subject.config.evaluate, subject.name.replace(" ", "_")
    questions: list[Question] = multihost.on_process_zero(lambda: read_questions(settings.mt_bench))

    def sample(prompts: Mapping[int, TokenIds], turn: int, **fields: object) -> list:
        return subject.generate(prompts, turn, **fields, **_sizes(subject.config, max(map(len, prompts.values()))))

    answers = answer(questions, subject.chat, sample, settings.mt_bench_tokens)
    file = answers_file(subject.directory, name)
    multihost.on_process_zero(functools.partial(write_answers, file, name, questions, answers))
    return _measures(answers)


def _measures(answers: Sequence[Sequence[Turn]]) -> dict[str, float]:
    turns = [turn for turns in answers for turn in turns]
    measures = {"tokens": [turn.tokens for turn in turns], "truncated": [turn.truncated for turn in turns]}
    return {f"mt_bench/{name}": float(np.mean(values)) for name, values in measures.items()}


def _sizes(config: Config, longest: int) -> dict[str, object]:
    """Fewer slots, and fewer prompts at a time, for what is longer than the run's own prompts and responses."""
    generate, prompt = config.generate, config.data.max_prompt_length
    size = generate.batch_size
    room, needed = size * (prompt + generate.max_new_tokens), longest + config.evaluate.mt_bench_tokens
    while size * needed > room and size % (2 * jax.device_count()) == 0:
        size //= 2
    prefill = generate.prefill_batch_size * prompt // max(prompt, longest)
    return {"batch_size": size, "prefill_batch_size": max(1, prefill)}


def _refusal(config: Config) -> str | None:
    if not config.evaluate.mt_bench:
        return "needs questions: set --config.evaluate.mt_bench to a copy of FastChat's llm_judge/data"
    if config.data.template != "chat":
        return "asks in two turns, which the paper's templates do not take: set --config.data.template=chat"
    try:
        read_questions(config.evaluate.mt_bench)
    except UserError as error:
        return str(error)
    return None


mt_bench = Evaluator(_measure, _refusal, auto=True, costly=True)
