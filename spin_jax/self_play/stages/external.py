"""Let another program write responses, such as vLLM on another machine: write a file of prompts, read one of responses.

With `config.generate.source="external"` the generate stage writes the first two of these files into `generated/`, and
the run ends. When the third file exists, the same command checks it, takes the responses, and goes on with scoring and
training.

    request.json     where the model is, what identifies it, how to sample, and which ids end a response
    prompts.jsonl    {"row", "number", "request", "tokens"}: a line for each response that is wanted, with its prompt
    responses.jsonl  {"row", "number", "request"} of that line, with the response's "tokens" or its "text"; and
                     "truncated": true where a budget of tokens ended it

"request" is a hash of the prompt, the model and the sampling settings. A response to another request is refused.
"""

import hashlib
import json
import logging
from collections.abc import Mapping

import numpy as np
from etils import epath

from spin_jax.data.pairs import token_ids
from spin_jax.data.sources import Example
from spin_jax.errors import UserError
from spin_jax.generation.response_files import Response
from spin_jax.runtime.files import reading, write_whole
from spin_jax.self_play.pairs import asked_examples, write_responses
from spin_jax.self_play.run import Run

PROMPTS, REQUEST, RESPONSES = "prompts.jsonl", "request.json", "responses.jsonl"
NAMED = 5  # missing responses that a message names at most

_LOG = logging.getLogger(__name__)


def exchange_files(run: Run, t: int, directory: epath.Path, model: Mapping[str, str]) -> bool:
    """Take the responses of iteration t from `directory` if they are there, else write the request. Return whether they
    were there. Call it on process 0 alone.

    Args:
        model: identifies theta_t.

    Raises:
        UserError: a response is missing, there twice, to another request, or broken; the message names the line.
    """
    if not (directory / RESPONSES).exists():
        _ask(run, t, directory, model)
        return False
    responses = _read(run, directory, model)
    write_responses(run, directory, asked_examples(run), responses, dict(model))
    _LOG.info("iteration %d takes %d responses from %s", t, len(responses), directory / RESPONSES)
    return True


def _ask(run: Run, t: int, directory: epath.Path, model: Mapping[str, str]) -> None:
    asked = {"iteration": t, "model": str(run.start_of(t)), "fingerprint": dict(model), "sampling": _sampling(run)}
    lines = []
    for example in asked_examples(run):
        tokens, mark = run.asked(example.row).tolist(), _mark(run, example.row, model)
        for number in range(run.config.generate.responses):
            lines.append(json.dumps({"row": example.row, "number": number, "request": mark, "tokens": tokens}) + "\n")
    write_whole(directory / REQUEST, json.dumps(asked, indent=1) + "\n")
    write_whole(directory / PROMPTS, "".join(lines))


def _sampling(run: Run) -> dict[str, object]:
    generate = run.config.generate
    names = ("temperature", "top_p", "top_k", "max_new_tokens", "min_new_tokens")
    found: dict[str, object] = {name: getattr(generate, name) for name in names}
    stops = {"stop_token_ids": list(run.chat.stop_ids), "stop": list(generate.stop_strings)}
    return found | stops | {"seed": run.config.seed}


def _mark(run: Run, row: int, model: Mapping[str, str]) -> str:
    """Hash the request that a response to a row must answer."""
    request = [dict(model), _sampling(run), run.asked(row).tolist()]
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]


def _read(run: Run, directory: epath.Path, model: Mapping[str, str]) -> list[Response]:
    """Read and check the responses, and return them in the order of the request."""
    examples = {example.row: example for example in asked_examples(run)}
    marks = {row: _mark(run, row, model) for row in examples}
    wanted = [(row, number) for row in examples for number in range(run.config.generate.responses)]
    path, found = directory / RESPONSES, {}
    with reading(path, "write it anew, a JSON object a line"):
        lines = path.read_text().removeprefix("\ufeff").split("\n")
    for position, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = _response(run, examples, json.loads(line), marks)
            if (one.row, one.number) in found:
                raise ValueError(f"row {one.row}, number {one.number} is there twice")
        except (ValueError, TypeError, KeyError, RecursionError, UserError) as error:
            raise UserError(f"{path}:{position}: {_reason(error)}") from None
        found[one.row, one.number] = one
    if missing := [key for key in wanted if key not in found]:
        named = ", ".join(f"row {row} number {number}" for row, number in missing[:NAMED])
        raise UserError(f"{path}: {len(missing):,} of {len(wanted):,} responses are missing ({named}, ...): add them")
    return [found[key] for key in wanted]


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def _response(run: Run, examples: Mapping[int, Example], line: object, marks: Mapping[int, str]) -> Response:
    if not isinstance(line, dict):
        raise ValueError(f"a line must be an object with named fields, not {type(line).__name__}")
    row, number, truncated = line["row"], line["number"], line.get("truncated", False)
    if row not in examples or number not in range(run.config.generate.responses):
        raise ValueError(f"row {row!r}, number {number!r} was not asked for: copy both from {PROMPTS}")
    if line["request"] != marks[row]:
        raise ValueError(
            f"a response to request {line['request']!r}, and row {row} is now {marks[row]!r}: model, data or sampling "
            f"changed; delete {PROMPTS} and {RESPONSES}, and answer the new ones"
        )
    if not isinstance(truncated, bool):
        raise ValueError(f"truncated={truncated!r}: write true or false")
    if line.get("tokens") is not None:
        tokens = _sampled(run, examples[row], line["tokens"], truncated)
    elif isinstance(line["text"], str):
        tokens = run.chat.sampled_ids(examples[row].prompt, line["text"], truncated)
        if len(tokens) > (most := run.config.generate.max_new_tokens):  # cut it where our own sampler would have
            tokens, truncated = tokens[:most], True
    else:
        raise ValueError(f"text must be text, not {type(line['text']).__name__}")
    return Response(row, number, tokens, truncated, np.zeros(0, np.float32))


def _sampled(run: Run, example: Example, ids: list, truncated: bool) -> np.ndarray:
    """Check that our own sampler could have drawn the token ids of a response, and return them.

    Raises:
        ValueError, UserError: it could not have.
    """
    tokens = token_ids(ids, run.model.vocab_size, "tokens") if ids else np.zeros(0, np.int32)
    run.chat.generated_response(example.prompt, tokens, truncated)  # refuses ids whose end contradicts `truncated`
    if np.isin(tokens[:-1], run.chat.stop_ids).any():
        raise ValueError("a stop id stands before the end: cut the response behind it")
    if len(tokens) > (most := run.config.generate.max_new_tokens):
        raise ValueError(f"{len(tokens)} tokens, and --config.generate.max_new_tokens={most} were asked for")
    return tokens
