"""A model with its weights, outside of a run: what an evaluation scores and samples with."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from spin_jax import checkpoints, models, sizing
from spin_jax.config import Config, GenerateConfig, replace
from spin_jax.data.pairs import TokenIds
from spin_jax.data.tokenizer import load_tokenizer, own_stop_ids
from spin_jax.devices.accelerators import Device
from spin_jax.errors import UserError
from spin_jax.evaluation.scoring import LOGITS_CHUNK, PROMPTS
from spin_jax.generation.engine import Engine
from spin_jax.generation.response_files import Response
from spin_jax.generation.stop_strings import stop_table
from spin_jax.language_model import on_both_meshes
from spin_jax.runtime import multihost


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A Hugging Face model, on its devices.

    Attributes:
        config: with no size left open.
        generate: `config.generate` as it was given, with the sizes that it leaves to the devices.
        source: its directory.
        model: its description.
        tokenizer: has an EOS.
        stop_ids: the EOS, and those of the model's own files.
        execution: how it computes, on the training mesh.
        params: laid out on that mesh, in the dtype of its matmuls.
        devices: of both meshes.
    """

    config: Config
    generate: GenerateConfig
    source: pathlib.Path
    model: models.ModelConfig
    tokenizer: Any
    stop_ids: tuple[int, ...]
    execution: models.Execution
    params: dict
    devices: Sequence[Device]

    def sample(
        self,
        prompts: Mapping[int, TokenIds],
        iteration: int = 0,
        stop_ids: tuple[int, ...] | None = None,
        **fields: object,
    ) -> list[Response]:
        """A response to each prompt, in their order, sampled with `config.seed`.

        Args:
            prompts: token ids of each, by the index that its seed is made of.
            iteration: another one gives other responses.
            stop_ids: a response ends with the first of these; None: the model's own.
            fields: of `config.generate`, other than the config's.
        """
        # The sizes that are chosen anew are those of sampling, for these lengths.
        changes = {f"generate.{name}": value for name, value in {**vars(self.generate), **fields}.items()}
        longest = max(map(len, prompts.values()))
        config = replace(self.config, changes | {"data.max_prompt_length": longest, "generate.responses": 1})
        config = sizing.choose(config, self.model, self.devices, run=False)
        _, decode = on_both_meshes(config, self.model, self.devices)
        stops_AV = stop_table(self.tokenizer, config.generate.stop_strings, self.model.vocab_size)
        stop_ids = self.stop_ids if stop_ids is None else stop_ids
        engine = Engine(self.model, config.generate, decode, stop_ids, stops_AV)
        return engine.generate(self.params, prompts, seed=self.config.seed, iteration=iteration)


def load_model(config: Config, devices: Sequence[Device] | None = None, params: dict | None = None) -> LoadedModel:
    """The model at `config.model.path`, with its weights.

    Args:
        config: of a run, for `model`, `mesh`, `train.row_length`, `generate` and `seed`.
        devices: that it lies on; None is all there are.
        params: of the model, on the training mesh, in place of those that its directory has.

    Raises:
        UserError: it is not there or not supported, or has no tokenizer with an EOS.
    """
    devices = devices or jax.devices()
    path, revision = config.model.path, config.model.revision or None
    source = multihost.on_each_process(lambda: pathlib.Path(checkpoints.resolve(path, revision)))
    model = multihost.on_each_process(lambda: checkpoints.read_config(source))
    tokenizer: Any = multihost.on_each_process(lambda: load_tokenizer(source))
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no eos_token: set one in tokenizer_config.json")
    stop_ids = tuple(dict.fromkeys((tokenizer.eos_token_id, *own_stop_ids(source))))
    sizes = {"train.batch_size": PROMPTS * len(devices), "train.micro_batches": 1}
    sizes["model.logits_chunk"] = config.model.logits_chunk or LOGITS_CHUNK
    chosen = sizing.choose(replace(config, sizes), model, devices, run=False)
    execution, _ = on_both_meshes(chosen, model, devices)
    shardings = models.param_shardings(execution.mesh, model)
    if params is None:
        params = multihost.on_each_process(
            lambda: checkpoints.load(source, dtype=execution.dtype, shardings=shardings)[1]
        )
    return LoadedModel(chosen, config.generate, source, model, tokenizer, stop_ids, execution, params, devices)
