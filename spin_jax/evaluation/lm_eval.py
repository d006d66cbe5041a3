"""Tasks of the lm-evaluation-harness, which a model is asked one after the other; what is asked is kept."""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from spin_jax import checkpoints
from spin_jax.config import Config, EvaluateConfig, replace
from spin_jax.config.fields import did_you_mean
from spin_jax.errors import UserError, as_flag
from spin_jax.evaluation.interface import Evaluator, Subject
from spin_jax.reports.paper_tables import SUITES
from spin_jax.reports.scores import score_tables
from spin_jax.reports.task_scores import DIRECTORY, TaskScores
from spin_jax.runtime import multihost
from spin_jax.runtime.files import expand

if TYPE_CHECKING:  # it imports the harness, which takes seconds and is an extra
    from spin_jax.evaluation.harness import HarnessModel

_LOG = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What a model is asked.

    Attributes:
        name: of a task or group of tasks.
        shots: examples before each question; None is the task's own number.
        task: the harness's object, and the manager that made it.
        metrics: that go into a result; None is all.
    """

    name: str
    shots: int | None
    task: Any
    manager: Any
    metrics: tuple[str, ...] | None


@functools.lru_cache(maxsize=2)  # a run asks all its models the same
def load_tasks(settings: EvaluateConfig) -> list[Asked]:
    """The tasks that `settings.tasks` names, with their data, which may be downloaded.

    Raises:
        UserError: a task is not known, its data cannot be read, or the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the lm-evaluation-harness is not installed: pip install 'spin_jax[eval]'")
    include_path = os.path.abspath(expand(settings.include_path)) if settings.include_path else None
    found = {}
    for name, shots, metrics in _wanted(settings.tasks):
        manager = _manager(include_path, name)
        matching = manager.match_tasks([name])
        if not matching:
            hint = did_you_mean(name, [*SUITES, *manager.all_tasks])
            raise UserError(f"{name} is no task of the harness, nor of --config.evaluate.include_path{hint}")
        for match in matching:
            with _at(settings.data_dir):
                found |= {one: Asked(one, shots, task, manager, metrics) for one, task in _load(manager, match).items()}
    return list(found.values())


def _manager(include_path: str | None, name: str) -> Any:
    """What knows a task. The harness reads its own 14,000 files for some 20 seconds, which a task of one's own can do
    without; a group may be of theirs."""
    if include_path and (own := _read_tasks(include_path, include_defaults=False)).match_tasks([name]):
        if name not in own.all_groups:
            return own
    return _read_tasks(include_path, include_defaults=True)


@functools.cache
def _read_tasks(include_path: str | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _wanted(tasks: Sequence[str]) -> Iterator[tuple[str, int | None, tuple[str, ...] | None]]:
    """(name or pattern, shots, metrics) of each task."""
    for one in tasks:
        name, colon, shots = one.partition(":")
        if name in SUITES and not colon:
            yield from ((column.task, column.shots, (column.metric,)) for column in SUITES[name].columns)
        elif name and shots.isdecimal() or not colon:
            yield name, int(shots) if colon else None, None
        else:
            flag = as_flag("evaluate.tasks", tuple(tasks))
            raise UserError(f"{flag}: write {one!r} as 'task:shots', such as 'arc_challenge:25'")


@contextlib.contextmanager
def _at(data_dir: str) -> Iterator[None]:
    """Where a folder of a data set's name is, it is that data set, as `datasets.load_dataset` has it."""
    if not data_dir:
        yield
        return
    if not os.path.isdir(expand(data_dir)):
        raise UserError(f"{as_flag('evaluate.data_dir', data_dir)} is not a directory")
    with contextlib.chdir(expand(data_dir)):
        yield


def _load(manager: Any, name: str) -> dict[str, Any]:
    """A task, a group of tasks, or each task with a tag; by name."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # noqa: BLE001  a task's own code, datasets and the Hub each raise their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"task {name} cannot be loaded ({first}): go online, or copy its data to a folder of their name on the "
            "Hub and name what is above it, as --config.evaluate.data_dir=DIR"
        ) from error
    return {name: loaded["groups"][name]} if name in loaded["groups"] else loaded["tasks"]


def evaluate(config: Config, models: Sequence[str], out: epath.PathLike) -> str:
    """Ask models what `config.evaluate` says. Returns the tables of their scores, which are kept below `out`.

    Args:
        models: Hugging Face directories or Hub ids, each with `config.model` but for its path.

    Raises:
        UserError: a task cannot be asked, or a model is none.
    """
    load_tasks(config.evaluate)  # refused before a model is read
    return score_tables({path: _evaluate(config, path, epath.Path(out)) for path in models})


def _evaluate(config: Config, path: str, out: epath.Path) -> dict[str, TaskScores]:
    from spin_jax.evaluation.harness import HarnessModel
    from spin_jax.evaluation.loaded_model import load_model

    model = HarnessModel(load_model(replace(config, {"model.path": path})))
    identity = multihost.on_process_zero(lambda: checkpoints.fingerprint(model.loaded.source))
    return ask_all(model, config.evaluate, out / path.strip("/").replace("/", "__"), identity)


def ask_all(
    model: "HarnessModel", settings: EvaluateConfig, directory: epath.Path, identity: Mapping[str, str]
) -> dict[str, TaskScores]:
    """Task -> a model's scores. All processes call it. What `directory` has already is not asked again.

    Args:
        identity: of the model, as `checkpoints.fingerprint` has it.
    """
    return {asked.name: _ask(model, asked, settings, directory, identity) for asked in load_tasks(settings)}


def _ask(
    model: "HarnessModel", asked: Asked, settings: EvaluateConfig, directory: epath.Path, identity: Mapping[str, str]
) -> TaskScores:
    import lm_eval

    options = {"limit": settings.limit or None, "apply_chat_template": settings.apply_chat_template}
    options["fewshot_as_multiturn"] = settings.apply_chat_template and settings.fewshot_as_multiturn
    versions = {"harness": lm_eval.__version__, "dtype": model.get_model_info()["model_dtype"]}
    key = {"model": dict(identity), "shots": asked.shots, **options, **versions}
    known = multihost.on_process_zero(lambda: TaskScores.read(directory, asked.name))
    if known and known.key == key:
        return known
    simple_evaluate: Any = lm_eval.simple_evaluate  # a wrapper hides its arguments
    results = simple_evaluate(
        model=model, tasks=[asked.task], task_manager=asked.manager, num_fewshot=asked.shots, **options
    )
    scores = _scores(asked, results, key)
    multihost.on_process_zero(lambda: scores.write(directory))
    return scores


def _scores(asked: Asked, results: Mapping[str, Any], key: Mapping[str, object]) -> TaskScores:
    """What the harness found, with a score for each question of each metric that is a mean of such scores."""
    of_task = {name.removesuffix(",none"): value for name, value in results["results"][asked.name].items()}
    values = {name: value for name, value in of_task.items() if isinstance(value, float) and "_stderr" not in name}
    errors = {name: of_task.get(_stderr(name)) for name in values}
    samples = [one for task in sorted(results["samples"]) for one in results["samples"][task]]
    questions = {}
    for name, value in values.items():
        metric, _, kept = name.partition(",")
        found = [one.get(metric) for one in samples if one["filter"] == (kept or "none")]
        if found and all(isinstance(one, (int, float)) for one in found) and np.isclose(np.mean(found), value):
            questions[name] = [float(one) for one in found]
    written = [one for one in samples if one["filter"] == samples[0]["filter"] and isinstance(one["resps"][0][0], str)]
    return TaskScores(
        task=asked.name,
        shots=asked.shots,
        key=key,
        values=values,
        errors={name: error for name, error in errors.items() if isinstance(error, float)},
        questions=questions,
        answers=[one["resps"][0][0] for one in written],
        harness={name: results[name] for name in ("results", "versions", "n-shot", "n-samples")},
    )


def _stderr(metric: str) -> str:
    name, comma, kept = metric.partition(",")
    return f"{name}_stderr{comma}{kept}"


def _measure(subject: Subject) -> dict[str, float]:
    """Values and standard errors; the scores of single questions are kept beside the result."""
    from spin_jax.evaluation.harness import HarnessModel
    from spin_jax.evaluation.loaded_model import load_model

    config = replace(subject.config, {"model.path": str(subject.source), "model.revision": ""})
    model = HarnessModel(load_model(config, params=subject.params()))
    found = ask_all(model, config.evaluate, subject.directory / DIRECTORY, subject.identity())
    row = {}
    for asked in load_tasks(config.evaluate):
        scores = found[asked.name]
        for metric in asked.metrics or scores.values:
            if metric in scores.values:
                row[f"{asked.name}/{metric}"] = scores.values[metric]
            if metric in scores.errors:
                row[f"{asked.name}/{metric}_stderr"] = scores.errors[metric]
    return row


def _refusal(config: Config) -> str | None:
    if not config.evaluate.tasks:
        return "asks nothing: name tasks, as --config.evaluate.tasks=\"('open_llm',)\""
    load_tasks(config.evaluate)
    return None


lm_eval = Evaluator(_measure, _refusal, auto=True, costly=True)
