"""Read, keep, export and identify the models of a run."""

import contextlib
from collections.abc import Iterator

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from spin_jax import checkpoints, models
from spin_jax.config import LoraConfig
from spin_jax.errors import UserError
from spin_jax.runtime import multihost
from spin_jax.runtime.files import writing


class ModelStore:
    """Models by their directories, all of one architecture. Only one at a time is in memory: two might not fit."""

    def __init__(self, model: models.ModelConfig, mesh: Mesh, source: epath.Path, export_dtype: jnp.dtype):
        self._model, self._mesh, self._source, self._export_dtype = model, mesh, source, export_dtype
        self._loaded: tuple[epath.Path, dict] | None = None
        self._identities: dict[epath.Path, dict[str, str]] = {}

    def identity_of(self, directory: epath.Path) -> dict[str, str]:
        """Return the fingerprint of the model in `directory`, which is stored with its responses and scores."""
        if directory not in self._identities:
            with self._reading(directory):
                self._identities[directory] = multihost.on_process_zero(lambda: checkpoints.fingerprint(directory))
        return self._identities[directory]

    def params(self, directory: epath.Path) -> dict:
        """Return the f32 params in `directory`, sharded. The params that were used last stay in memory.

        Raises:
            UserError: `directory` has no complete model.
        """
        if self._loaded is None or self._loaded[0] != directory:
            self._loaded = None
            if not multihost.on_process_zero((directory / "config.json").exists):
                raise UserError(f"{directory} holds no model: run the stages before this one first")
            shardings = models.param_shardings(self._mesh, self._model)
            with self._reading(directory):
                self._loaded = (directory, multihost.on_each_process(lambda: _load_params(directory, shardings)))
        return self._loaded[1]

    @contextlib.contextmanager
    def _reading(self, directory: epath.Path) -> Iterator[None]:
        """If a model that this run has made is damaged, say what to do about it."""
        try:
            yield
        except UserError as error:
            if directory == self._source:
                raise
            raise UserError(f"delete {directory}, and its stage makes it anew: {error}") from None

    def take_params(self, directory: epath.Path) -> dict:
        """Like `params`, but forget them: the caller may donate them."""
        params = self.params(directory)
        self._loaded = None
        return params

    def keep_params(self, directory: epath.Path, params: dict) -> None:
        """Give back f32 params of `directory` that `take_params` returned. They must be unchanged."""
        self._loaded = (directory, params)

    def export_adapter(self, directory: epath.Path, lora: LoraConfig, adapters: dict, start: epath.Path) -> None:
        """Write low-rank updates of the model in `start` as a PEFT adapter."""
        with writing(directory), checkpoints.uploaded(directory) as local:
            checkpoints.save_adapter(local, self._model, lora, adapters, base=start)

    def export(self, directory: epath.Path, params: dict) -> None:
        """Write params as a Hugging Face directory, and keep them in memory if they equal the files, which f32 does."""
        with writing(directory), checkpoints.uploaded(directory) as local:
            checkpoints.save(local, self._model, params, source=self._source, dtype=self._export_dtype)
        multihost.gather(None)  # wait, so that no process reads it before it is complete
        self._identities.pop(directory, None)
        self._loaded = (directory, params) if self._export_dtype == jnp.float32 else None


def _load_params(directory: epath.Path, shardings: dict) -> dict:
    with checkpoints.downloaded(directory) as local:
        return checkpoints.load(local, shardings=shardings)[1]
