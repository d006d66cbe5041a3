"""The Python surface: load a model, sample from it, run SPIN on a list of examples, save, answer a file of prompts."""

import ast
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from spin_jax import checkpoints, models
from spin_jax.config import FIELDS, Config, base_config, freeze, override
from spin_jax.data.chat_format import ChatFormat, load_chat
from spin_jax.data.rows import make_all
from spin_jax.data.sources import Example, Message, encodable, read_prompts
from spin_jax.data.tokenize import tokenise
from spin_jax.devices.accelerators import Device
from spin_jax.errors import UserError
from spin_jax.evaluation.scoring import LOGITS_CHUNK, PROMPTS, Scorer
from spin_jax.generation import batch_inference
from spin_jax.generation.engine import Engine
from spin_jax.language_model import on_both_meshes
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
    """A language model: its description, its params (a plain nested dict of arrays) and its chat format. It computes on
    the devices that hold its params."""

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
        FIELDS["seed"].check("seed", seed)
        engine = self.engine(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
        with out_of_memory.told("sample", _FOR_SAMPLE):
            return [self.decode(one.tokens) for one in engine.generate(self.params, self.encode(prompts), seed=seed)]

    @_in_python
    def logprobs(
        self, prompts: Sequence[str | Sequence[Message]], responses: Sequence[str] | Sequence[Sequence[str]]
    ) -> np.ndarray:
        """log p(response | prompt), the end of the turn included, in nats.

        Args:
            prompts: as for `sample`.
            responses: a text for each prompt, or a list of texts for each.

        Returns:
            f32 [prompts], or [prompts, texts]; NaN where a prompt has fewer texts than another.
        """
        if len(prompts) != len(responses):
            raise UserError(f"{len(prompts)} prompts, {len(responses)} responses: give one, or a list, for each prompt")
        texts = [[one] if isinstance(one, str) else list(one) for one in responses]
        turns = list(map(tuple, read_prompts(prompts)))
        rows = [
            [tokenise(self.chat, Example(row, prompt, encodable(text))) for text in answers]
            for row, (prompt, answers) in enumerate(zip(turns, texts, strict=True))
        ]
        asked = [self.chat.training_prompt(prompt) for prompt in turns]
        logps = self.scorer().logprobs(self.params, asked, [[tokens.real for tokens in row] for row in rows])
        return logps.reshape(-1) if all(isinstance(one, str) for one in responses) else logps

    def encode(self, prompts: Sequence[str | Sequence[Message]]) -> list[np.ndarray]:
        """What the model is asked with to answer each prompt: int32 token ids, for an `engine`."""
        return make_all(self.chat.generation_prompt, read_prompts(prompts), "prompt ")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response's token ids, without special tokens."""
        return self.chat.codec.decode(tokens)

    @_in_python
    def engine(self, **generate: object) -> Engine:
        """Samples token ids of responses, with this model's params or others of its shape.

        Args:
            generate: fields of `config.generate`, such as max_new_tokens=128, temperature=0.7 or responses=4.
        """
        config, _, decode = self._computing({f"generate.{name}": value for name, value in generate.items()})
        return Engine.for_chat(self.config, config.generate, decode, self.chat)

    @_in_python
    def scorer(self, **model: object) -> Scorer:
        """Gives log-probs of token ids of responses, under this model's params or others of its shape.

        Args:
            model: fields of `config.model`, such as compute_dtype="float32".
        """
        changes = {f"model.{name}": value for name, value in ({"logits_chunk": LOGITS_CHUNK} | model).items()}
        changes["train.batch_size"] = PROMPTS * len(self._devices)
        config, execution, _ = self._computing(changes)
        return Scorer(self.config, config.train, execution)

    @property
    def _devices(self) -> list[Device]:
        placed = getattr(jax.tree.leaves(self.params)[0], "sharding", None)
        mesh = placed.mesh if isinstance(placed, NamedSharding) else None
        return list(mesh.devices.flat) if isinstance(mesh, Mesh) else jax.local_devices()[:1]

    def _computing(self, changes: dict[str, object]) -> tuple[Config, models.Execution, models.Execution]:
        """(config with no size left open, how training computes, how sampling does)."""
        config = _config({"model.path": os.fspath(self.directory), "data.train": "not read", **changes})
        config = choose(config, self.config, self._devices, run=False)
        return config, *on_both_meshes(config, self.config, self._devices)

    @_in_python
    def save(self, directory: str | os.PathLike, dtype: jnp.dtype = jnp.float32) -> None:
        """Write a Hugging Face directory that `transformers` and `load` read."""
        directory = _local(directory)
        with writing(directory):
            checkpoints.save(directory, self.config, self.params, source=self.directory, dtype=dtype)


def _config(changes: Mapping[str, object]) -> Config:
    written = base_config()
    override(written, changes)
    return freeze(written)


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
    devices: Sequence[Device] | None = None,
) -> Model:
    """A model from a Hugging Face directory or Hub id, with f32 params.

    Args:
        path_or_id: a directory, or a Hub repository's owner/name.
        revision: of the repository.
        template: "chat", the tokenizer's own, or "paper", as `config.data.template`.
        parse_special_tokens: as `config.data.parse_special_tokens`.
        devices: that share the params, and compute with them, such as jax.devices(); None is the first.

    Raises:
        UserError: one line on what is missing or not supported.
    """
    compilation_cache.keep()
    with out_of_memory.told("load", out_of_memory.for_loading()):
        directory = epath.Path(checkpoints.resolve(path_or_id, revision))
        model, shardings = checkpoints.read_config(directory), None
        special = {"parse_special_tokens": parse_special_tokens, "vocab_size": model.vocab_size}
        chat = load_chat(pathlib.Path(directory), template, **special)
        if devices:
            config = choose(Config(), model, devices, run=False)
            shardings = models.param_shardings(on_both_meshes(config, model, devices)[0].mesh, model)
        return Model(*checkpoints.load(directory, shardings=shardings), chat, directory)


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
        workdir: where the starting model (`start/`), data, responses, metrics, the report and models are written.
        overrides: config fields by their dotted names, such as {"iterations": 1, "train.batch_size": 8}.

    Raises:
        UserError: one line on what is wrong with the config or an example, or that `workdir` was begun with other
            examples or another model, or is in use.
    """
    lines, overrides = _lines(examples), dict(overrides or {})
    if twice := [field for field in ("model.path", "data.train") if field in overrides]:
        raise UserError(f"--config.{twice[0]} is what `model` and `examples` say: leave it out")
    workdir = make(_local(workdir))
    data = workdir / "examples.jsonl"
    start = workdir / "start"  # the model as it is in memory, which need not be what its directory holds
    given = {
        "model.path": os.fspath(start),
        "data.train": os.fspath(data),
        "data.template": model.chat.name,
        "data.parse_special_tokens": not model.chat.codec.kept,
    }
    config = _config(given | overrides)
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
    """Answer a file of prompts with the model in a directory, over all devices. The same call goes on where it ended.

    >>> spin_jax.answer("my-sft-model", "my-prompts.jsonl", "answers.jsonl", {"generate.max_new_tokens": 16})
    >>> with open("answers.jsonl") as lines:
    ...     print(sorted(json.loads(next(lines))))
    ['logp', 'prompt', 'response', 'tokens', 'truncated']

    Args:
        model: a Hugging Face directory, such as an iteration's `model/`, or a Hub id.
        prompts: a file or other source that `data.sources.load_prompts` reads; a row needs no response.
        out: the JSONL file to write; `spin_jax.generation.batch_inference` says what is in it.
        overrides: config fields by their dotted names, such as {"seed": 1, "generate.temperature": 0.7}.

    Raises:
        UserError: one line on what is wrong with config, prompts, model or `out`.
    """
    given = {"model.path": os.fspath(model), "data.train": os.fspath(prompts)}
    batch_inference.answer(_config(given | dict(overrides or {})), out)
