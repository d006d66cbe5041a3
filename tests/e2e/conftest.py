"""One tiny run, made once and looked at by many tests."""

import dataclasses
import pathlib

import jax
import pytest
import tiny_files
from ml_collections import ConfigDict

from spin_jax import training_stage
from spin_jax.self_play import self_play


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """Every run here, and every process that is started, compiles the same few programs in no time: they are kept all
    the same. Elsewhere that costs more than it saves."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "0")
        jax.config.update(name, 0)
        yield
    jax.config.update(name, before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> pathlib.Path:
    return tiny_files.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> pathlib.Path:
    return tiny_files.write_jsonl(tmp_path_factory.mktemp("tiny") / "rows.jsonl", tiny_files.make_rows())


@dataclasses.dataclass(frozen=True)
class Finished:
    """A whole run of two iterations; do not write into its workdir."""

    config: ConfigDict
    workdir: pathlib.Path
    rows: list[dict]  # of the summary
    trained_on: list[list[int]]  # by iteration, the rows of the data set that its batches held


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_model, tiny_data) -> Finished:
    trained_on, fit = [], training_stage.fit

    def watched(*args, steps, make_batch, **settings):
        trained_on.append([int(row) for step in range(steps) for row in make_batch(step).rows])
        return fit(*args, steps=steps, make_batch=make_batch, **settings)

    config, workdir = tiny_files.make_config(tiny_model, tiny_data), tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_stage, "fit", watched)
        rows = self_play(config, workdir)
    return Finished(config, workdir, rows, trained_on)
