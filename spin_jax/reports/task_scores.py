"""What a model scored in a task of the lm-evaluation-harness, question by question: kept, read, compared."""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping

import numpy as np
from etils import epath

from spin_jax.runtime import files

DIRECTORY = "lm_eval"  # of a model's scores, beside its result
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """Scores of a model in a task.

    Attributes:
        task: the harness's name of the task or group of tasks.
        shots: examples before each question, where not the task's own number.
        key: what decides the scores: the model's fingerprint, the settings, the harness's version.
        values: metric -> its value, as the harness gives it. A metric is named as in the harness, without ",none".
        errors: metric -> the standard error of its value, where the harness gives one.
        questions: metric -> the score of each question, where the value is their mean.
        answers: to each question, where the task has the model write some.
        harness: what else the harness says: scores of a group's tasks, versions, sizes.
    """

    task: str
    shots: int | None
    key: Mapping[str, object]
    values: Mapping[str, float]
    errors: Mapping[str, float]
    questions: Mapping[str, list[float]]
    answers: list[str]
    harness: Mapping[str, object]

    def write(self, directory: epath.PathLike) -> None:
        """Keep them, whole or not at all, in the task's file of a directory."""
        files.write_whole(path_of(directory, self.task), json.dumps(vars(self), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def read(cls, directory: epath.PathLike, task: str) -> "TaskScores | None":
        """What `write` kept; None where there is nothing, or a damaged file, which is said."""
        path = path_of(directory, task)
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            _LOG.warning("%s is damaged (%s): its task is asked again", path, error)
            return None


def path_of(directory: epath.PathLike, task: str) -> epath.Path:
    """The file of a task's scores."""
    return epath.Path(directory) / f"{task}.json"


def read_all(directory: epath.PathLike) -> dict[str, TaskScores]:
    """Task -> its scores, of all that a directory has."""
    directory = epath.Path(directory)
    names = sorted(path.stem for path in directory.glob("*.json")) if directory.exists() else []
    found = {name: TaskScores.read(directory, name) for name in names}
    return {name: scores for name, scores in found.items() if scores}


def difference(scores: TaskScores, base: TaskScores, metric: str) -> tuple[float, float] | None:
    """How much more a model scores than another on the same questions, and the standard error of that.

    With d_i the difference at question i, the mean of d and sqrt(var(d) / n): where questions are right or wrong, the
    error of McNemar's test. It is smaller than that of two separate means, as both models find the same questions hard.

    Returns:
        None where the two were not asked the same, question by question.
    """
    asked = [{name: value for name, value in one.key.items() if name != "model"} for one in (scores, base)]
    ours, theirs = scores.questions.get(metric), base.questions.get(metric)
    if asked[0] != asked[1] or not ours or not theirs or len(ours) != len(theirs):
        return None
    d = np.subtract(ours, theirs)
    return float(d.mean()), float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.nan
