"""What the stages of a run share: the data, the model's description, the mesh, and where things lie in the workdir.

    workdir/
      config.json                    what the run was started with; a resumed run must agree
      tokens.npz                     the examples' token ids, for the next start
      compiled/                      programs, for the next start of the command
      sft/                           the SFT stage, where the config asks for one
      iteration_T/
        generated/part-*.jsonl       responses of the opponent, batch by batch and process by process
        generated/pairs.parquet      the authors' layout, when all are there
        scores/opponent.npz          the opponent's log-probs of every pair
        checkpoints/                 of the training state, until model/ is whole
        metrics.jsonl, tensorboard/, profile/
        model/                       the policy, a Hugging Face directory: the next opponent
        result.json                  the iteration's line in the summary
      summary.json, summary.txt, plots/

What exists under its final name is finished: starting again is resuming. Several processes share one workdir.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from spin_jax import config as config_lib
from spin_jax import hosts, models, programs, sharding
from spin_jax.batches import num_steps
from spin_jax.data.chat import ChatFormat, fit, load_chat
from spin_jax.data.pairs import Pair
from spin_jax.data.sources import Example, Examples, Skip, load_examples, split_examples
from spin_jax.errors import UserError
from spin_jax.metrics import is_remote, write_whole
from spin_jax.tokens import Tokenised, tokenise_once

# Fields that may differ when a run is resumed: they change speed, memory or the length of the run, and no finished
# artefact.
MAY_CHANGE = (
    "iterations",
    "mesh.",
    "model.attention",
    "model.remat",
    "model.logits_chunk",
    "train.checkpoint_every",
    "train.length_multiple",
    "train.micro_batches",
    "train.row_length",
)
# One value an iteration: only those of iterations that have begun to train are fixed.
PER_ITERATION = ("spin.beta", "train.learning_rate")

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """One run, opened: everything that does not change between iterations."""

    config: ConfigDict
    workdir: epath.Path
    source: epath.Path  # directory of the model before any training here, with its tokenizer
    model: models.ModelConfig
    chat: ChatFormat
    train_examples: list[Example]
    held_out_examples: list[Example]
    tokens: dict[int, Tokenised]  # of these examples, by row
    compute: models.Compute  # on the training mesh
    decode: models.Compute  # on the decode mesh
    pairs: dict[int, tuple[list[Pair], list[Pair]]] = dataclasses.field(default_factory=dict)  # by iteration, once read
    profile: bool = False  # whether the next training stage is to be traced
    _loaded: tuple[epath.Path, dict] | None = None

    def iteration(self, t: int) -> epath.Path:
        """The directory of iteration t."""
        return self.workdir / f"iteration_{t}"

    def start_of(self, t: int) -> epath.Path:
        """The directory of theta_t: the opponent of iteration t, and where its policy starts."""
        if t:
            return self.iteration(t - 1) / "model"
        return self.workdir / "sft" / "model" if self.config.sft.epochs else self.source

    def params(self, directory: epath.Path) -> dict:
        """The f32 params in `directory`, sharded; the ones used last stay in memory.

        Raises:
            UserError: there is no whole model in `directory`.
        """
        if self._loaded is None or self._loaded[0] != directory:
            self._loaded = None  # two models at a time are one too many
            if not hosts.on_first((directory / "config.json").exists):
                raise UserError(f"{directory} holds no model: run the stages before this one first")
            shardings = models.param_shardings(self.compute.mesh, self.model)
            self._loaded = (directory, hosts.on_each(lambda: _load_params(directory, shardings)))
        return self._loaded[1]

    def take_params(self, directory: epath.Path) -> dict:
        """Like `params`, for a caller that donates them."""
        params = self.params(directory)
        self._loaded = None
        return params

    def export(self, directory: epath.Path, params: dict) -> None:
        """Write params as a Hugging Face directory. From then on they are what the files hold."""
        dtype = jnp.dtype(self.config.model.export_dtype)
        with _uploaded(directory) as local:
            models.save(local, self.model, params, source=self.source, dtype=dtype)
        hosts.gather(None)  # nobody reads it before it is whole
        self._loaded = (directory, params) if dtype == jnp.float32 else None

    def is_held_out(self, row: int) -> bool:
        """Whether a row of the data set is held out of training."""
        return row in self._held_out_rows

    @functools.cached_property
    def _held_out_rows(self) -> frozenset[int]:
        return frozenset(example.row for example in self.held_out_examples)

    def asked(self, row: int) -> np.ndarray:
        """The token ids that the opponent is asked with, cut to the budget."""
        return self.tokens[row].asked[-self.config.data.max_prompt_length :]

    def pair(
        self,
        example: Example,
        response: np.ndarray | str,
        finished: bool,
        iteration: int,
        tokens: Tokenised | None = None,
    ) -> Pair:
        """The token ids of an example and its generated response, cut to the budget; `tokens` are those of an example
        that is not the run's."""
        tokens = tokens or self.tokens[example.row]
        generated = self.chat.generated_response(example.prompt, response, finished)
        data = self.config.data
        fitted = fit(
            tokens.prompt,
            tokens.real,
            generated,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
        )
        return Pair(
            row=example.row,
            iteration=iteration,
            prompt=fitted.prompt,
            real=fitted.responses[0],
            generated=fitted.responses[1],
            real_cut=fitted.cut[0],
            generated_cut=fitted.cut[1] or not finished,
        )


def open_run(config: ConfigDict, workdir: epath.PathLike) -> Run:
    """Check the config, then the data, then the model's description; load no weights.

    Raises:
        UserError: one line for whatever is wrong.
    """
    config_lib.validate(config)
    check_alike(config)
    workdir = hosts.on_each(lambda: _make_workdir(workdir))
    check_shared(workdir)
    hosts.on_first(lambda: _agree_with_workdir(config, workdir))
    path, train = config.model.path, config.data.train
    if path == "toy:":
        from spin_jax import toy

        path, train = hosts.on_first(lambda: toy.prepare(workdir / "toy", config.toy, config.seed))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sharding.check_pairs(mesh, config.train.batch_size, config.train.micro_batches)
    source, model, chat, compute, decode = open_player(config, path, mesh)
    models.param_shardings(mesh, model)
    train_examples, held_out, tokens = _load_data(config, train, workdir, source, chat)
    _check_steps(config, len(train_examples))
    _note_start(config, workdir, train_examples, held_out)
    if config.data.max_length > model.max_position_embeddings:  # a cap: the rows may well be shorter
        _LOG.warning(
            "config.data.max_length=%d: %s was made for %d positions, longer rows are beyond it",
            config.data.max_length,
            source,
            model.max_position_embeddings,
        )
    return Run(config, workdir, source, model, chat, train_examples, held_out, tokens, compute, decode)


class Player(NamedTuple):
    """A model in the hands of a config, without its weights."""

    source: epath.Path  # its directory, with its tokenizer
    model: models.ModelConfig
    chat: ChatFormat
    compute: models.Compute  # on the training mesh
    decode: models.Compute  # on the decode mesh


def open_player(config: ConfigDict, path: str, mesh: jax.sharding.Mesh) -> Player:
    """The model at `path`, a directory or Hub id, and how it computes on the devices of a training mesh.

    Raises:
        UserError: it is not there or not supported, has no usable tokenizer, or cannot sample on these devices.
    """
    source = hosts.on_each(lambda: epath.Path(models.resolve(path, config.model.revision or None)))
    model = hosts.on_each(lambda: models.read_config(source))
    compute = programs.make_compute(config.model, model, mesh)
    decode = programs.make_decode_compute(config, model, compute)
    sharding.check_batch(decode.mesh, "--config.generate.batch_size", config.generate.batch_size)
    models.param_shardings(decode.mesh, model)
    chat = hosts.on_each(lambda: load_chat(source, config.data.template))
    return Player(source, model, chat, compute, decode)


def _make_workdir(workdir: epath.PathLike) -> epath.Path:
    if is_remote(workdir):
        return epath.Path(workdir)
    workdir = epath.Path(workdir).resolve()  # Orbax wants it absolute
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from None
    return workdir


def check_alike(config: ConfigDict) -> None:
    """Refuse processes that were started with different settings: they would wait for each other."""
    first, *others = hosts.gather(_as_json(config))
    for process, other in enumerate(others, start=1):
        if changed := [field for field in first if first[field] != other[field]]:
            raise UserError(
                f"config.{changed[0]} is {first[changed[0]]!r} for process 0 and {other[changed[0]]!r} for process "
                f"{process}: start all with the same settings"
            )


def check_shared(directory: epath.Path) -> None:
    """Refuse a directory that the hosts do not share, in which each would wait for the others' files."""
    if not hosts.are_several():
        return
    note = directory / f"seen_by_all_hosts_{hosts.gather(uuid.uuid4().hex)[0]}"
    hosts.on_first(lambda: note.write_text(""))
    seen = hosts.gather(_appears(note))
    hosts.on_first(note.unlink)
    if not all(seen):
        raise UserError(
            f"{directory} is not one directory for all hosts (process {seen.index(False)} does not see what "
            "process 0 writes): give a gs:// path, or a file system that all of them mount"
        )


def _appears(path: epath.Path, seconds: int = 5) -> bool:
    for _ in range(seconds):
        if path.exists():
            return True
        time.sleep(1)
    return False


def _check_steps(config: ConfigDict, rows: int) -> None:
    """Refuse an iteration that would end before its warm-up does: nothing would be trained, or nearly nothing."""
    steps = num_steps(rows, config.train.epochs, config.train.batch_size)
    if steps <= math.ceil(config.train.warmup_ratio * steps):
        raise UserError(
            f"{rows} rows give {steps} step(s), all of them warm-up: lower config.train.batch_size or "
            "config.train.warmup_ratio, or raise config.train.epochs"
        )


def _load_params(directory: epath.Path, shardings: dict) -> dict:
    with _downloaded(directory) as local:
        return models.load(local, shardings=shardings)[1]


@contextlib.contextmanager
def _downloaded(directory: epath.Path) -> Iterator[epath.Path]:
    """The directory, or a local copy of a remote one: weights are mapped into memory, which an object store cannot."""
    if not is_remote(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as local:
        for file in directory.iterdir():
            file.copy(epath.Path(local) / file.name)
        yield epath.Path(local)


@contextlib.contextmanager
def _uploaded(directory: epath.Path) -> Iterator[epath.Path]:
    """The directory, or a local one that is copied to the remote one when written; config.json, the sign of a whole
    model, goes last."""
    if not is_remote(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)
        for file in sorted(epath.Path(local).iterdir(), key=lambda file: file.name == "config.json"):
            file.copy(directory / file.name, overwrite=True)


def _load_data(
    config: ConfigDict, train: str, workdir: epath.Path, source: epath.Path, chat: ChatFormat
) -> tuple[list[Example], list[Example], dict[int, Tokenised]]:
    """(examples to train on, held-out ones, their token ids by row). Every process reads all of the text, of which it
    then tokenises a share."""
    data = config.data

    def draw(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
        return split_examples(examples, data.eval_rows, config.seed, train_rows=data.max_rows)

    def tokens_of(examples: Sequence[Example]) -> dict[int, Tokenised]:
        made = tokenise_once(workdir / "tokens.npz", source, data.template, chat, examples)
        return {example.row: tokens for example, tokens in zip(examples, made, strict=True)}

    found = hosts.on_each(lambda: load_examples(train, split=data.split, layout=data.layout, turn=data.turn))
    _LOG.info("%s: %s", train, found.summary())
    if data.long_prompts == "keep_end":  # no row is refused: those that are not drawn need no tokens
        drawn = draw(found.examples)
        return *drawn, tokens_of([*drawn[0], *drawn[1]])
    tokens = tokens_of(found.examples)
    usable = _with_short_prompts(found.examples, tokens, data.max_prompt_length)
    if usable.skipped:
        _LOG.info("%s: %s", train, usable.summary())
    return *draw(usable.examples), tokens


def _with_short_prompts(examples: Sequence[Example], tokens: dict[int, Tokenised], longest: int) -> Examples:
    kept = Examples([], [])
    for example in examples:
        if len(tokens[example.row].asked) > longest:
            kept.skipped.append(Skip(example.row, f"prompt longer than {longest} tokens"))
        else:
            kept.examples.append(example)
    return kept


def _agree_with_workdir(config: ConfigDict, workdir: epath.Path) -> None:
    """Refuse to go on in a workdir that was started with other settings."""
    path = workdir / "config.json"
    if not path.exists():
        return
    now = _as_json(config)
    # A field that the schema has got since then had its default.
    before = _as_json(config_lib.base_config()) | json.loads(path.read_text())
    begun = 0
    while any((workdir / f"iteration_{begun}" / name).exists() for name in ("checkpoints", "model")):
        begun += 1

    def differs(field: str) -> bool:
        if field in PER_ITERATION:  # values of iterations that have not begun to train are free
            return any(
                config_lib.at_iteration(now[field], t) != config_lib.at_iteration(before[field], t)
                for t in range(begun)
            )
        return now[field] != before[field] and not field.startswith(MAY_CHANGE)

    if changed := [field for field in now if differs(field)]:
        what = ", ".join(f"config.{field} was {before[field]!r} and is now {now[field]!r}" for field in changed)
        raise UserError(
            f"{workdir} holds a run with other settings ({what}): give another --workdir, or the settings it had"
        )


def _note_start(config: ConfigDict, workdir: epath.Path, train: list[Example], held_out: list[Example]) -> None:
    """Note the settings and the data in the workdir, once all has been found to work.

    Raises:
        UserError: the data is not what the run was started with, whatever its path, or not the same on all hosts:
            pairs would be mismatched.
    """
    path = workdir / "config.json"
    rows = [(e.row, e.prompt, e.response, e.generated) for e in train + held_out]
    fingerprint = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    if len(set(hosts.gather(fingerprint))) > 1:
        raise UserError(f"config.data.train={config.data.train} is not the same data on all hosts: copy it anew")

    def note() -> None:
        if path.exists() and json.loads(path.read_text()).get("fingerprint", fingerprint) != fingerprint:
            raise UserError(
                f"{config.data.train} is not the data that {workdir} was started with: give another --workdir"
            )
        write_whole(path, json.dumps(_as_json(config) | {"fingerprint": fingerprint}, indent=1) + "\n")

    hosts.on_first(note)


def _as_json(config: ConfigDict) -> dict:
    """Flat, with tuples as JSON has them."""
    return json.loads(json.dumps(config_lib.flatten(config)))
