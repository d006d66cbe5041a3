"""Sampling alone: a file of prompts in, a file of answers out, from any model that a run can start from or has made.

    OUT                          a line a response, in the prompts' order, when all are there
    OUT.parts/settings.json      what decides a response; parts of other settings are refused, never mixed in
    OUT.parts/lease.json         which process is at work, while responses are drawn
    OUT.parts/part-*.jsonl       responses as they end, process by process, until OUT is there

A line of OUT has `prompt` (text, or turns where the prompts file has turns), `response` (text, without a stop string),
`tokens` (how many were sampled, with the one that ends the response), `logp` (the sum of the model's log-probs of them,
in nats) and `truncated` (whether it reached `config.generate.max_new_tokens` without an end). The response to a row is
that of a run's iteration 0 to the same row: a function of (weights, seed, row) alone, and with
`config.generate.responses` of which of them it is.
"""

import hashlib
import json
import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from spin_jax import checkpoints, models, sizing
from spin_jax.config import FIELDS, Config, DataConfig, flatten, freeze
from spin_jax.data.chat_format import ChatFormat
from spin_jax.data.rows import make_all
from spin_jax.data.sources import Message, as_messages, load_prompts
from spin_jax.devices.accelerators import check_slice
from spin_jax.errors import UserError
from spin_jax.generation.engine import Engine, warn_if_endless
from spin_jax.generation.response_files import Response, note_settings
from spin_jax.language_model import LanguageModel, open_language_model
from spin_jax.runtime import compilation_cache, multihost, out_of_memory
from spin_jax.runtime.files import expand, is_remote, write_whole
from spin_jax.runtime.lease import held
from spin_jax.runtime.multihost import check_alike, check_shared

_LOG = logging.getLogger(__name__)


def answer(config: ConfigDict | Config, out: epath.PathLike) -> None:
    """Sample a response to each prompt of `config.data.train` from the model at `config.model.path`, into `out`.

    Read are `config.seed` and all of `config.model`, `config.generate`, `config.mesh` and `config.data`, but for the
    rows to draw and to hold out: every prompt is answered.

    Raises:
        UserError: one line for whatever is wrong, found before weights are loaded unless it is in their files.
        Stopped: one of several processes was asked to; the same call goes on.
    """
    config = freeze(config)
    check_alike(config)
    multihost.on_process_zero(lambda: check_slice(config.mesh.slice, jax.devices()))
    data, out = config.data, expand(out)
    out = out if is_remote(out) else out.absolute()
    parts = out.with_name(f"{out.name}.parts")
    compilation_cache.keep(out)
    multihost.on_process_zero(lambda: _check_free(out))
    prompts = multihost.on_process_zero(
        lambda: load_prompts(data.train, split=data.split, layout=data.layout, turn=data.turn)
    )
    described = multihost.on_each_process(
        lambda: checkpoints.describe(config.model.path, config.model.revision or None)
    )
    chosen = multihost.on_process_zero(lambda: sizing.choose(config, described, jax.devices(), run=False))
    multihost.on_process_zero(lambda: sizing.check_memory(chosen, described, jax.devices(), trains=False, run=False))
    _answer(chosen, out, parts, prompts)


@out_of_memory.tells("generate", out_of_memory.for_sampling)
def _answer(config: Config, out: epath.Path, parts: epath.Path, prompts: Sequence[str | list[Message]]) -> None:
    lm, data = open_language_model(config, config.model.path), config.data
    there, dtype = sizing.describe(jax.devices()), np.dtype(lm.decode.dtype).name
    _LOG.info("%s: %s; computes in %s, %d slots", there, lm.source, dtype, config.generate.batch_size)
    tokens = multihost.on_process_zero(lambda: _tokenise(lm.chat, prompts, data))
    with held(parts, f"--out={out}"):
        check_shared(parts)
        multihost.on_process_zero(lambda: _check_free(out))  # another call may have ended in the meantime
        multihost.on_process_zero(lambda: note_settings(parts, _settings(config, lm, tokens)))
        engine = Engine.for_chat(lm.model, config.generate, lm.decode, lm.chat)
        # Laid out here already, so that what was loaded is let go where that is another copy.
        params = multihost.on_each_process(lambda: engine.lay_out(_load_params(lm)))
        responses = engine.generate(params, tokens, seed=config.seed, directory=parts)
        multihost.on_process_zero(
            lambda: _finish(out, parts, lm.chat, config.generate.stop_strings, prompts, responses)
        )
        warn_if_endless(responses, config.generate.max_new_tokens)


def _check_free(out: epath.Path) -> None:
    if out.exists():
        raise UserError(f"{out} is there already: delete it, or name another file to write")


def _tokenise(chat: ChatFormat, prompts: Sequence[str | list[Message]], data: DataConfig) -> list[np.ndarray]:
    """What the model is asked with; a prompt over the budget keeps its end, unless `config.data.long_prompts` says that
    there shall be none."""
    asked = make_all(chat.generation_prompt, map(as_messages, prompts), f"{data.train} row ")
    longest = data.max_prompt_length
    if too_long := [row for row, tokens in enumerate(asked) if len(tokens) > longest]:
        what = f"{len(too_long):,} of {len(asked):,} prompts are longer than --config.data.max_prompt_length={longest}"
        if data.long_prompts == "skip":
            raise UserError(
                f"{data.train}: {what}, the first in row {too_long[0]}: raise it, or cut their beginnings with "
                "--config.data.long_prompts=keep_end"
            )
        _LOG.warning("%s: %s and asked without their beginning", data.train, what)
    return [tokens[-longest:] for tokens in asked]


def _settings(config: Config, lm: LanguageModel, tokens: Sequence[np.ndarray]) -> dict[str, object]:
    """What decides a response, by the name that a refusal gives it."""
    fields, texts = flatten(config), json.dumps([ids.tolist() for ids in tokens])
    decoding = {f"--config.{name}": fields[name] for name, field in FIELDS.items() if field.decodes}
    decoding["--config.generate.stop_strings"] = list(config.generate.stop_strings)  # as JSON has it
    model = checkpoints.fingerprint(lm.source) | {"stop ids": list(lm.chat.stop_ids)}
    decoding |= {f"model ({part})": content for part, content in model.items()}
    return decoding | {
        "--config.seed": config.seed,
        "--config.model.compute_dtype": str(np.dtype(lm.decode.dtype)),
        "list of prompts": hashlib.sha256(texts.encode()).hexdigest(),
    }


def _load_params(lm: LanguageModel) -> dict:
    """In the compute dtype, laid out for sampling: there is no f32 copy, as training has one."""
    shardings = models.param_shardings(lm.decode.mesh, lm.model)
    return checkpoints.load(lm.source, dtype=lm.decode.dtype, shardings=shardings)[1]


def _finish(
    out: epath.Path,
    parts: epath.Path,
    chat: ChatFormat,
    stop_strings: Sequence[str],
    prompts: Sequence[str | list[Message]],
    responses: Sequence[Response],
) -> None:
    """`out`, which takes the place of the parts."""
    texts = [chat.codec.decode(response.tokens) for response in responses]
    ends = [min((text.find(stop) for stop in stop_strings if stop in text), default=None) for text in texts]
    lines = [
        {
            "prompt": prompts[response.row],
            "response": text[:end],
            "tokens": len(response.tokens),
            "logp": round(float(response.logprobs.sum(dtype=np.float64)), 4),
            "truncated": response.truncated and end is None,
        }
        for text, end, response in zip(texts, ends, responses, strict=True)
    ]
    write_whole(out, "".join(json.dumps(line) + "\n" for line in lines))
    parts.rmtree()
    _LOG.info("%s: %d answers, %d of them truncated", out, len(lines), sum(line["truncated"] for line in lines))
