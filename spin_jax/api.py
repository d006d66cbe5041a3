"""The Python surface: load a model, sample from it, run SPIN on a list of examples, save, answer a file of prompts."""

import ast
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from etils import epath

from spin_jax import checkpoints, models
from spin_jax.config import FIELDS, Config, base_config, freeze, override, replace
from spin_jax.data.chat_format import ChatFormat, load_chat
from spin_jax.data.sources import Message, read_prompts
from spin_jax.data.tokenize import ask
from spin_jax.devices import sharding
from spin_jax.errors import UserError
from spin_jax.generation import batch_inference
from spin_jax.generation.engine import generate
from spin_jax.generation.programs import make_sampler
from spin_jax.generation.response_files import Prompt
from spin_jax.models.execution import make_compute, make_decode_compute
from spin_jax.runtime import compilation_cache, out_of_memory
from spin_jax.runtime.files import expand, is_remote, write_whole, writing
from spin_jax.runtime.lease import held
from spin_jax.self_play.algorithm import self_play
from spin_jax.self_play.workdir import make
from spin_jax.sizing import choose

_FOR_SAMPLE = ("fewer prompts at a time", "a smaller max_new_tokens", 'spin_jax.answer with {"generate.batch_size": 8}')

_FLAG = re.compile(r"""--(config\.)?([a-z_.]*[a-z_])(?:=("[^"]*"|'[^']*'|[^\s"']*[^\s"'.,:;)]))?""")


def _in_python(call: Callable) -> Callable:
    """Messages name what to change as flags; raised from `call` they name it as it is written here: an entry of
    `overrides`, such as "data.template": "paper", where it takes them, and else an argument, such as top_p=0.9."""
    takes_overrides = "overrides" in call.__annotations__

    def rewritten(flag: re.Match) -> str:
        is_field, name, value = flag.groups()
        name, is_ = (f'"{name}"', ": ") if is_field and takes_overrides else (name.rpartition(".")[2], "=")
        return name if value is None else name + is_ + _literal(value)

    @functools.wraps(call)
    def called(*args, **kwargs):
        try:
            return call(*args, **kwargs)
        except UserError as error:
            error.args = (_FLAG.sub(rewritten, str(error)),)
            raise

    return called


def _literal(value: str) -> str:
    """A flag's value as Python writes it."""
    value = value[1:-1] if value[0] in "\"'" else value
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return json.dumps(value, ensure_ascii=False)
    return value


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model: its description, its params (a plain nested dict of arrays) and its chat format."""

    config: models.ModelConfig
    params: dict
    chat: ChatFormat
    directory: epath.Path

    @_in_python
    def sample(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str]:
        """One answer to each prompt: a string (a user turn) or a list of {"role", "content"} messages.

        `temperature=0` is greedy. The answer to prompt i depends on (params, seed, i) and not on the other prompts.
        """
        if isinstance(prompts, str):
            raise UserError("prompts must be a list: write [prompt] for one")
        chosen = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        for name, value in {"seed": seed, **{f"generate.{name}": value for name, value in chosen.items()}}.items():
            FIELDS[name].check(name, value)
        config = replace(Config(), {f"generate.{name}": value for name, value in chosen.items()})
        mesh = sharding.one_device_mesh()
        config = choose(config, self.config, list(mesh.devices.flat), run=False)
        slots = min(config.generate.batch_size, 1 << (len(prompts) - 1).bit_length())
        settings = dataclasses.replace(config.generate, batch_size=slots)
        compute = make_decode_compute(config.mesh, self.config, make_compute(config.model, self.config, mesh))
        with out_of_memory.told("sample", _FOR_SAMPLE):
            responses = generate(
                make_sampler(self.config, settings, self.chat.stop_ids, compute),
                self.params,
                [Prompt(i, ids) for i, ids in enumerate(ask(self.chat, read_prompts(prompts), "prompt "))],
                settings,
                seed=seed,
                iteration=0,
                mesh=compute.mesh,
            )
        return [self.chat.codec.decode(response.tokens) for response in responses]

    @_in_python
    def save(self, directory: str | os.PathLike, dtype: jnp.dtype = jnp.float32) -> None:
        """Write a Hugging Face directory that `transformers` and `load` read."""
        directory = _local(directory)
        with writing(directory):
            checkpoints.save(directory, self.config, self.params, source=self.directory, dtype=dtype)


def _local(directory: str | os.PathLike) -> epath.Path:
    if is_remote(directory):
        raise UserError(f"{directory}: weights are written to this machine's disk; give a directory, and copy it then")
    return expand(directory)


@_in_python
def load(
    path_or_id: str | os.PathLike,
    revision: str | None = None,
    template: str = "chat",
    parse_special_tokens: bool = False,
) -> Model:
    """A model from a Hugging Face directory or Hub id, with f32 params.

    Args:
        path_or_id: a directory, or a Hub repository's owner/name.
        revision: of the repository.
        template: "chat", the tokenizer's own, or "paper", as `config.data.template`.
        parse_special_tokens: as `config.data.parse_special_tokens`.

    Raises:
        UserError: one line on what is missing or not supported.
    """
    compilation_cache.keep()
    with out_of_memory.told("load", out_of_memory.for_loading()):
        directory = epath.Path(checkpoints.resolve(path_or_id, revision))
        vocab_size = checkpoints.read_config(directory).vocab_size
        chat = load_chat(directory, template, parse_special_tokens=parse_special_tokens, vocab_size=vocab_size)
        return Model(*checkpoints.load(directory), chat, directory)


@_in_python
def spin(
    model: Model,
    examples: Sequence[Mapping],
    workdir: str | os.PathLike,
    overrides: Mapping[str, object] | None = None,
) -> Model:
    """Run SPIN from `model` on `examples`; returns the last iteration's model. Called again with the same, it goes on.

    Args:
        model: the SFT model.
        examples: rows as a JSONL file would hold them, such as {"prompt": ..., "response": ...} or {"messages": [...]}.
        workdir: where the starting model (`start/`), data, responses, metrics, plots and models are written.
        overrides: config fields by their dotted names, such as {"iterations": 1, "train.batch_size": 8}.

    Raises:
        UserError: one line on what is wrong with the config or an example, or that `workdir` was begun with other
            examples or another model, or is in use.
    """
    lines, overrides = _lines(examples), dict(overrides or {})
    if given := [field for field in ("model.path", "data.train") if field in overrides]:
        raise UserError(f"--config.{given[0]} is what `model` and `examples` say: leave it out")
    workdir = make(_local(workdir))
    data = workdir / "examples.jsonl"
    start = workdir / "start"  # the model as it is in memory, which need not be what its directory holds
    written = base_config()
    from_model = {
        "model.path": os.fspath(start),
        "data.template": model.chat.name,
        "data.parse_special_tokens": not model.chat.codec.kept,
    }
    override(written, from_model | {"data.train": os.fspath(data)} | overrides)
    config = freeze(written)
    with held(workdir, f"workdir={workdir}"):
        if (workdir / "config.json").exists() and data.exists() and data.read_text() != lines:
            raise UserError(
                f"{data} holds other examples: give another workdir, or the examples that it was begun with"
            )
        write_whole(data, lines)
        if not (start / "config.json").exists():
            model.save(start)
        elif not checkpoints.holds(start, model.config, model.params):
            raise UserError(f"{start} holds another model: give another workdir, or the model that it was begun with")
        self_play(config, workdir)
    last = workdir / f"iteration_{config.iterations - 1}" / "model"
    return load(last, template=config.data.template, parse_special_tokens=config.data.parse_special_tokens)


def _lines(examples: Sequence[Mapping]) -> str:
    """The examples as a JSONL file holds them."""
    if isinstance(examples, str | os.PathLike):
        raise UserError(f"examples must be a list of rows, not {os.fspath(examples)!r}: read the file first")
    lines = []
    for number, example in enumerate(examples):
        try:
            lines.append(json.dumps(dict(example)) + "\n")
        except (TypeError, ValueError) as error:
            raise UserError(f"example {number} is no row of JSON ({error}): write a dict of texts") from None
    return "".join(lines)


@_in_python
def answer(
    model: str | os.PathLike,
    prompts: str | os.PathLike,
    out: str | os.PathLike,
    overrides: Mapping[str, object] | None = None,
) -> None:
    """Answer a file of prompts with the model in a directory, over all devices. Called again after a cut, it goes on.

    >>> spin_jax.answer("my-sft-model", "my-prompts.jsonl", "answers.jsonl", {"generate.max_new_tokens": 16})
    >>> with open("answers.jsonl") as lines:
    ...     print(sorted(json.loads(next(lines))))
    ['cut', 'logp', 'prompt', 'response', 'tokens']

    Args:
        model: a Hugging Face directory, such as an iteration's `model/`, or a Hub id.
        prompts: a file or other source that `data.sources.load_prompts` reads; a row needs no response.
        out: the JSONL file to write; `spin_jax.generation.batch_inference` says what is in it.
        overrides: config fields by their dotted names, such as {"seed": 1, "generate.temperature": 0.7}.

    Raises:
        UserError: one line on what is wrong with config, prompts, model or `out`.
    """
    config = base_config()
    override(config, {"model.path": os.fspath(model), "data.train": os.fspath(prompts)} | dict(overrides or {}))
    batch_inference.answer(config, out)
