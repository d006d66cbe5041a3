"""One tiny run, made once and looked at by many tests."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator

import pytest
import tiny_files

from spin_jax.config import Config
from spin_jax.runtime import progress
from spin_jax.self_play import training_stage
from spin_jax.self_play.algorithm import self_play


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> pathlib.Path:
    return tiny_files.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> pathlib.Path:
    return tiny_files.write_jsonl(tmp_path_factory.mktemp("tiny") / "rows.jsonl", tiny_files.make_rows())


@dataclasses.dataclass(frozen=True)
class Finished:
    """A whole run of two iterations; do not write into its workdir."""

    config: Config
    workdir: pathlib.Path
    rows: list[dict]  # of the summary
    trained_on: list[list[int]]  # by iteration, the rows of the data set that its batches held
    told: list[str]  # what it logged


@contextlib.contextmanager
def listening(told: list[str]) -> Iterator[None]:
    """Adds what is logged inside."""
    log, handler = logging.getLogger("spin_jax"), logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield
    log.removeHandler(handler)
    log.setLevel(before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_model, tiny_data) -> Finished:
    trained_on, told, fit = [], [], training_stage.fit

    def watched(step_fn, state, opponent, make_batch, spec):
        trained_on.append([int(row) for step in range(spec.steps) for row in make_batch(step).rows])
        return fit(step_fn, state, opponent, make_batch, spec)

    config = tiny_files.make_config(tiny_model, tiny_data, {"evaluate.evaluators": ("auto",)})
    workdir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_stage, "fit", watched)
        patch.setattr(progress, "is_live", lambda: False)
        with listening(told):
            rows = self_play(config, workdir)
    return Finished(config, workdir, rows, trained_on, told)
