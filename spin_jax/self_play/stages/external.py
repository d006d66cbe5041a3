"""Responses that another program writes, such as vLLM on another machine: prompts go out as a file, responses come in.

With `config.generate.source="external"` the generate stage writes the first two of these into `generated/`, and the run
ends. When the third is there, the same command checks it, takes the responses, and goes on with scoring and training.

    request.json     where the model is, what identifies it, how to sample, and which ids end a response
    prompts.jsonl    {"row", "number", "model", "tokens"}: a line for each response that is wanted, with its prompt
    responses.jsonl  {"row", "number", "model"} of that line, with the response's "tokens" or its "text"; and
                     "truncated": true where a budget of tokens ended it
"""

import hashlib
import json
import logging
from collections.abc import Mapping

import numpy as np
from etils import epath

from spin_jax.data.pairs import token_ids
from spin_jax.errors import UserError
from spin_jax.generation.response_files import Response
from spin_jax.runtime.files import reading, write_whole
from spin_jax.self_play.pairs import asked_examples, write_responses
from spin_jax.self_play.run import Run

PROMPTS, REQUEST, RESPONSES = "prompts.jsonl", "request.json", "responses.jsonl"
NAMED = 5  # of many responses that are missing

_LOG = logging.getLogger(__name__)


def exchange_files(run: Run, t: int, directory: epath.Path, model: Mapping[str, str]) -> bool:
    """Take the responses of iteration t if they are in `directory`, else ask for them; returns whether they are there.
    For process zero alone. `model` is what identifies theta_t.

    Raises:
        UserError: a response is missing, there twice, of another model, or broken; it names the line.
    """
    if not (directory / RESPONSES).exists():
        _ask(run, t, directory, model)
        return False
    responses = _read(run, directory, model)
    write_responses(run, directory, asked_examples(run), responses, dict(model))
    _LOG.info("iteration %d takes %d responses from %s", t, len(responses), directory / RESPONSES)
    return True


def _ask(run: Run, t: int, directory: epath.Path, model: Mapping[str, str]) -> None:
    generate, lines = run.config.generate, []
    for example in asked_examples(run):
        for number in range(generate.responses):
            line = {"row": example.row, "number": number, "model": _mark(model)}
            lines.append(json.dumps(line | {"tokens": run.asked(example.row).tolist()}) + "\n")
    sampling = {name: getattr(generate, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
    sampling |= {
        "stop_token_ids": list(run.chat.stop_ids),
        "stop": list(generate.stop_strings),
        "seed": run.config.seed,
    }
    request = {"iteration": t, "model": str(run.start_of(t)), "fingerprint": dict(model), "sampling": sampling}
    write_whole(directory / REQUEST, json.dumps(request, indent=1) + "\n")
    write_whole(directory / PROMPTS, "".join(lines))
    _LOG.info(
        "iteration %d waits for responses: let another program answer %s with the model in %s, as %s says; then write "
        "%s, and start the same command again",
        *(t, directory / PROMPTS, run.start_of(t), REQUEST, directory / RESPONSES),
    )


def _mark(model: Mapping[str, str]) -> str:
    """A short name of a model by what identifies it."""
    return hashlib.sha256(json.dumps(dict(model), sort_keys=True).encode()).hexdigest()[:12]


def _read(run: Run, directory: epath.Path, model: Mapping[str, str]) -> list[Response]:
    """Responses in the order in which they were asked for."""
    examples = {example.row: example for example in asked_examples(run)}
    wanted = [(row, number) for row in examples for number in range(run.config.generate.responses)]
    path, found = directory / RESPONSES, {}
    with reading(path, "write it anew, a JSON object a line"):
        lines = path.read_text().splitlines()
    for position, line in enumerate(lines, 1):
        try:
            one = _response(run, examples, json.loads(line), _mark(model))
            if (one.row, one.number) in found:
                raise ValueError(f"row {one.row}, number {one.number} is there twice")
        except (ValueError, TypeError, KeyError, UserError) as error:
            raise UserError(f"{path}:{position}: {_reason(error)}") from None
        found[one.row, one.number] = one
    if missing := [key for key in wanted if key not in found]:
        named = ", ".join(f"row {row} number {number}" for row, number in missing[:NAMED])
        raise UserError(f"{path}: {len(missing):,} of {len(wanted):,} responses are missing ({named}, ...): add them")
    return [found[key] for key in wanted]


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def _response(run: Run, examples: Mapping, line: dict, mark: str) -> Response:
    row, number, truncated = line["row"], line["number"], line.get("truncated", False)
    if line["model"] != mark:
        raise ValueError(f"a response of model {line['model']!r}, and {mark!r} was asked: copy `model` from {PROMPTS}")
    if row not in examples or number not in range(run.config.generate.responses):
        raise ValueError(f"row {row!r}, number {number!r} was not asked for: copy both from {PROMPTS}")
    if not isinstance(truncated, bool):
        raise ValueError(f"truncated={truncated!r}: write true or false")
    if "tokens" in line:
        tokens = token_ids(line["tokens"], run.model.vocab_size, "tokens") if line["tokens"] else np.zeros(0, np.int32)
        run.chat.generated_response(examples[row].prompt, tokens, truncated)  # refuses an end that is not one
        if len(tokens) > (most := run.config.generate.max_new_tokens):
            raise ValueError(f"{len(tokens)} tokens, and --config.generate.max_new_tokens={most} were asked for")
    else:
        tokens = run.chat.sampled_ids(examples[row].prompt, line["text"], truncated)
    return Response(row, number, tokens, truncated, np.zeros(0, np.float32))
