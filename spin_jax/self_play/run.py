"""What the stages of a run share: the data, the model's description, the mesh, and where things lie in the workdir.

    workdir/
      config.json                    settings, data and model that the run was started with; a resumed run must agree
      lease.json                     whose the workdir is, while a run goes on in it
      tokens.npz                     the examples' token ids, for the next start
      sft/                           the SFT stage, where the config asks for one
      iteration_T/
        generated/part-*.jsonl       responses of the opponent, batch by batch and process by process
        generated/pairs.parquet      the authors' layout, when all are there
        scores/                      the opponent's log-probs of each training step's pairs, and of the held-out ones;
                                     theta_0's, where the reference is mixed
        checkpoints/                 of the training state, until model/ is whole
        metrics.jsonl, tensorboard/, profile/
        model/                       the policy, a Hugging Face directory: the next opponent
        adapter/                     with config.lora.rank: what of model/ was trained, as an adapter of its start
        result.json                  the iteration's line in the summary
        rewards.jsonl                the rewards of each held-out pair
        samples.jsonl                what the policy answers to the held-out prompts, beside the real and the opponent's
        control/                     plain SFT for as much compute, where the config asks for it
      result.json, samples.jsonl     the starting model's
      timing.jsonl                   what each start computed with, and how long each of its loops took
      summary.json, summary.txt, report.html

What exists under its final name is finished: starting again is resuming. Several processes share one workdir.
"""

import dataclasses
import functools
import logging
import operator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from spin_jax import checkpoints, models, sizing
from spin_jax.config import Config
from spin_jax.data.chat_format import ChatFormat, fit
from spin_jax.data.dataset import load_dataset
from spin_jax.data.pairs import Pair
from spin_jax.data.sources import Example
from spin_jax.data.tokenize import Tokenised
from spin_jax.devices import sharding
from spin_jax.devices.accelerators import check_slice
from spin_jax.errors import UserError
from spin_jax.evaluation import interface as evaluators
from spin_jax.language_model import open_language_model
from spin_jax.objectives.interface import check_objective
from spin_jax.reports import REPORTS
from spin_jax.runtime import multihost
from spin_jax.runtime.profiling import Profiler
from spin_jax.self_play import workdir as workdirs
from spin_jax.self_play.model_store import ModelStore
from spin_jax.training.programs import reads_generated
from spin_jax.training.schedule import check_warmup, num_steps

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, opened: everything that does not change between iterations."""

    config: Config
    workdir: epath.Path
    source: epath.Path  # directory of the model before any training here, with its tokenizer
    model: models.ModelConfig
    chat: ChatFormat
    train_examples: list[Example]
    held_out_examples: list[Example]
    tokens: dict[int, Tokenised]  # of these examples, by row
    execution: models.Execution  # on the training mesh
    decode: models.Execution  # on the decode mesh
    store: ModelStore
    profiler: Profiler
    pairs: dict[int, tuple[list[Pair], list[Pair]]]  # (train, held out) by iteration: a cache, which `pairs_of` fills

    def iteration(self, t: int) -> epath.Path:
        """The directory of iteration t."""
        return self.workdir / f"iteration_{t}"

    def start_of(self, t: int) -> epath.Path:
        """The directory of theta_t: the opponent of iteration t, and where its policy starts."""
        if t:
            return self.iteration(t - 1) / "model"
        return self.workdir / "sft" / "model" if self.config.sft.epochs else self.source

    def is_held_out(self, row: int) -> bool:
        """Whether a row of the data set is held out of training."""
        return row in self._held_out_rows

    @functools.cached_property
    def _held_out_rows(self) -> frozenset[int]:
        return frozenset(example.row for example in self.held_out_examples)

    @functools.cached_property
    def has_responses(self) -> bool:
        """Whether each row of the data has a generated response."""
        return all(example.generated is not None for example in self.train_examples + self.held_out_examples)

    def asked(self, row: int) -> np.ndarray:
        """The token ids that the opponent is asked with, cut to the budget."""
        return self.tokens[row].asked[-self.config.data.max_prompt_length :]

    def pair(
        self,
        example: Example,
        generated: tuple[np.ndarray | str, bool] | None = None,
        iteration: int = -1,
        tokens: Tokenised | None = None,
    ) -> Pair:
        """The token ids of an example and of a generated response, if there is one, cut to the budget.

        Args:
            generated: the response, and whether it is truncated.
            iteration: whose opponent wrote it.
            tokens: of an example that is not the run's.
        """
        tokens, data = tokens or self.tokens[example.row], self.config.data
        responses, truncated = [tokens.real], [False]
        if generated:
            responses.append(self.chat.generated_response(example.prompt, *generated))
            truncated.append(generated[1])
        budget = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
        fitted = fit(tokens.prompt, *responses, **budget)
        truncated = tuple(map(operator.or_, truncated, fitted.truncated))
        return Pair(example.row, iteration, fitted.prompt, fitted.responses, truncated)


def open_run(config: Config, workdir: epath.PathLike, trains: bool = True, profile: bool = False) -> Run:
    """Check the config, then the data, then the model's description; load no weights.

    Args:
        trains: whether the devices are to hold a training step, too.
        profile: whether to trace the first training stage that has steps to make.

    Raises:
        UserError: one line for whatever is wrong.
    """
    check_objective(config.spin)
    evaluators.chosen(config)
    list(REPORTS.values())  # those of a user that cannot be imported are refused now, and not after an iteration
    multihost.check_alike(config)
    multihost.on_process_zero(lambda: check_slice(config.mesh.slice, jax.devices()))
    workdir = multihost.on_each_process(lambda: workdirs.make(workdir))
    multihost.check_shared(workdir)
    multihost.on_process_zero(lambda: workdirs.check_settings(config, workdir))
    path, train = config.model.path, config.data.train
    if path == "toy:":
        from spin_jax.tasks import toy

        path, train = multihost.on_process_zero(lambda: toy.prepare(workdir / "toy", config.toy, config.seed))
    described = multihost.on_each_process(lambda: checkpoints.describe(path, config.model.revision or None))
    given, config = config, multihost.on_process_zero(lambda: sizing.choose(config, described, jax.devices()))
    multihost.on_process_zero(
        lambda: _is_finished(config, workdir) or sizing.check_memory(config, described, jax.devices(), trains)
    )
    source, model, chat, execution, decode = open_language_model(config, path)
    sharding.check_pairs(execution.mesh, config.train.batch_size, config.train.micro_batches)
    models.param_shardings(execution.mesh, model)
    train_examples, held_out, tokens = load_dataset(config, train, workdir, source, chat)
    _check_given(config, train_examples + held_out)
    _check_steps(config, len(train_examples))
    workdirs.note_start(config, workdir, source, train_examples, held_out)
    if not held_out:
        _LOG.info("--config.data.eval_rows=0: the summary has the last training step's margin and accuracy instead")
    if config.data.max_length > model.max_position_embeddings:  # a cap: the rows may well be shorter
        _LOG.warning(
            "--config.data.max_length=%d: %s was made for %d positions, longer rows are beyond it",
            config.data.max_length,
            source,
            model.max_position_embeddings,
        )
    _LOG.info(multihost.on_process_zero(lambda: f"{sizing.describe(jax.devices())}: {sizing.what(given, config)}"))
    store = ModelStore(model, execution.mesh, source, jnp.dtype(config.model.export_dtype))
    return Run(
        config,
        workdir,
        source,
        model,
        chat,
        train_examples,
        held_out,
        tokens,
        execution,
        decode,
        store,
        Profiler(profile),
        pairs={},
    )


def _is_finished(config: Config, workdir: epath.Path) -> bool:
    """Whether there is nothing left to train: a finished run is looked at on smaller devices, too."""
    last = workdir / f"iteration_{config.iterations - 1}"
    models_of_last = [last / "model"] + ([last / "control" / "model"] if config.sft.control else [])
    return all((model / "config.json").exists() for model in models_of_last)


def _check_steps(config: Config, rows: int) -> None:
    """Refuse a stage of training that fills no batch, or ends before its warm-up does."""
    train = config.train
    if config.sft.epochs:
        steps = num_steps(rows, config.sft.epochs, train.batch_size, "--config.sft.epochs")
        check_warmup(steps, train.warmup_ratio, "--config.sft.epochs")
    if train.match_flops:
        return  # `flops.check_matched` refuses too few
    responses = config.generate.responses if reads_generated(config.spin) and config.generate.source != "data" else 1
    check_warmup(num_steps(rows * responses, train.epochs, train.batch_size), train.warmup_ratio)


def _check_given(config: Config, examples: list[Example]) -> None:
    """Refuse to take the data's generated responses where a row has none."""
    if config.generate.source == "data" and (bare := [one.row for one in examples if one.generated is None]):
        raise UserError(
            f"--config.generate.source=data: row {bare[0]} of {config.data.train} has no generated response; rows need "
            "`real` and `generated`, or with --config.data.layout=preference `chosen` and `rejected`"
        )
