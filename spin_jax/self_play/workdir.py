"""Make a run's directory, and check that a resumed run has the settings, the data and the model it was begun with."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence

from etils import epath

from spin_jax import checkpoints
from spin_jax.config import FIELDS, Config, as_json, at_iteration
from spin_jax.config.fields import BY_ITERATION, CONTENT, FREE
from spin_jax.data.sources import Example
from spin_jax.errors import UserError
from spin_jax.runtime import multihost
from spin_jax.runtime.files import expand, find, is_remote, reading, write_whole

# Files that show that a stage has begun; a training stage has begun when it has a checkpoint.
_TRAINED = ("checkpoints/[0-9]*", "model/config.json")
_SFT = tuple(f"sft/{made}" for made in _TRAINED)
_SPIN = tuple(f"iteration_*/{made}" for made in _TRAINED)
_CONTROL = tuple(f"iteration_*/control/{made}" for made in _TRAINED)
_GENERATED = ("iteration_*/generated/pa*",)
_ANYTHING = (*_SFT, *_GENERATED, "iteration_*/scores/*", *_SPIN)
# Prefixes of fields, and the files that fix them: those of the stage that reads the field. Other fields are fixed as
# soon as any of these files exists.
_STAGES = (
    ("generate.", _GENERATED),
    ("spin.", _SPIN),
    ("train.", (*_SFT, *_SPIN)),
    ("lora.", (*_SFT, *_SPIN)),
    ("sft.learning_rate", _SFT),
    ("sft.optimizer", (*_SFT, *_CONTROL)),
    ("sft.loss_on", (*_SFT, *_CONTROL)),
    ("sft.control_learning_rate", _CONTROL),
)


def make(path: epath.PathLike) -> epath.Path:
    """Make the directory at --workdir if it is missing. Return an absolute path, as Orbax needs.

    Raises:
        UserError: it cannot be made.
    """
    workdir = expand(path)
    if is_remote(workdir):
        return workdir
    workdir = workdir.resolve()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from None
    return workdir


# ---- what a run was begun with


def check_settings(config: Config, workdir: epath.Path) -> None:
    """Refuse to go on in a workdir with results of other settings.

    Raises:
        UserError: with the fields, and their values then and now; or the workdir's note of them is damaged.
    """
    noted, now = _read_note(workdir), as_json(config)
    if not noted:
        return
    # A field that was added to the schema since then had its default.
    before = as_json(Config()) | noted
    if changed := [field for field in now if now[field] != before[field] and _is_fixed(field, now, before, workdir)]:
        what = ", ".join(f"--config.{field} was {before[field]!r} and is now {now[field]!r}" for field in changed)
        raise UserError(
            f"{workdir} holds a run with other settings ({what}): give another --workdir, or the settings it had"
        )


def _is_fixed(field: str, now: dict, before: dict, workdir: epath.Path) -> bool:
    """Whether the workdir has results of a field's old value."""
    rule = FIELDS[field].resume
    if rule == FREE or (rule == CONTENT and "start" in before):
        return False
    if rule == BY_ITERATION:
        begun = itertools.takewhile(lambda t: _has(workdir / f"iteration_{t}", _TRAINED), itertools.count())
        was = before[field] or [None]  # () in a note that somebody has edited
        return any(at_iteration(now[field], t) != at_iteration(was, t) for t in begun)
    return _has(workdir, next((made for prefix, made in _STAGES if field.startswith(prefix)), _ANYTHING))


def _has(directory: epath.Path, patterns: Sequence[str]) -> bool:
    return any(find(directory, pattern) for pattern in patterns)


def note_start(
    config: Config, workdir: epath.Path, source: epath.Path, train: list[Example], held_out: list[Example]
) -> None:
    """Note the settings, the data and the model at `source` in the workdir. Call it when all checks have passed.

    Raises:
        UserError: the content of data or model is not what the run was begun with, or not the same on all hosts.
    """
    rows = [(e.row, e.prompt, e.response, e.generated) for e in train + held_out]
    data = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    start = multihost.on_each_process(lambda: checkpoints.fingerprint(source))
    others = multihost.gather((data, start))
    if any(other_data != data for other_data, _ in others):
        raise UserError(f"--config.data.train={config.data.train} is not the same data on all hosts: copy it anew")
    if changed := next(filter(None, (_changes(start, other) for _, other in others)), ""):
        raise UserError(f"{source} is not the same model on all hosts (its {changed} differ): copy it anew")
    multihost.on_process_zero(lambda: _note(config, workdir, source, data, start))


def _note(config: Config, workdir: epath.Path, source: epath.Path, data: str, start: dict[str, str]) -> None:
    before = _read_note(workdir) if _has(workdir, _ANYTHING) else {}
    was = f"that {workdir} was started with"
    if before.get("fingerprint", data) != data:
        raise UserError(f"{config.data.train} is not the data {was}: give another --workdir")
    remedy = "put it back, or give another --workdir"
    check_model(before.get("start"), start, f"{source} is not the model {was}", remedy)
    note = as_json(config) | {"fingerprint": data, "start": start}
    write_whole(workdir / "config.json", json.dumps(note, indent=1) + "\n")


def check_model(before: Mapping[str, str] | None, now: Mapping[str, str], complaint: str, remedy: str) -> None:
    """Refuse results of another model than today's.

    Args:
        before, now: `checkpoints.fingerprint` of the two models. Older workdirs have no `before`, and are not refused.

    Raises:
        UserError: with the complaint, the parts of the model that changed, and the remedy.
    """
    if before and (changed := _changes(before, now)):
        raise UserError(f"{complaint} (changed: {changed}): {remedy}")


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Name the parts of a model that differ, as "weights, stop ids"."""
    return ", ".join(part for part in now if now[part] != before.get(part))


def _read_note(workdir: epath.Path) -> dict:
    path = workdir / "config.json"
    if not path.exists():
        return {}
    with reading(path, "put a copy back; or delete it, and settings, data and model go unchecked"):
        note = json.loads(path.read_text())
        if not isinstance(note, dict) or not isinstance(note.get("start") or {}, dict):
            raise TypeError("not an object")
        return note
