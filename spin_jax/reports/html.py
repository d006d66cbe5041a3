"""One or several runs as a page: `report.html`, which needs nothing but itself."""

import base64
import hashlib
import importlib.resources
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2
import numpy as np

from spin_jax.config import FIELDS, Config, as_json
from spin_jax.reports import responses, svg, timing
from spin_jax.reports.record import ITERATION, PETA, SPENT, RunRecord
from spin_jax.reports.scores import scores
from spin_jax.reports.summary import cells
from spin_jax.reports.svg import Range, Series

FILE = "report.html"


class Chart(NamedTuple):
    """Curves over optimizer steps: metrics with their labels, what to look for, and a level worth comparing with."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    note: str
    rule: tuple[float, str] | None = None


LOSS = "Loss"
STDERR = "_stderr"  # ends the name of a measure's standard error
_BOTH = "real", "generated"
CHARTS = (
    Chart(
        "Rewards",
        "beta log(policy / opponent), nats",
        tuple((f"rewards/{of}", of) for of in _BOTH),
        "The real one about 0 or above; the generated one falls.",
        (0.0, "the opponent"),
    ),
    Chart(
        "Margin",
        "reward of real - reward of generated",
        (("rewards/margin", "margin"),),
        "Begins at 0 in each iteration and grows to some tenths, or a few units.",
        (0.0, "no better than the opponent"),
    ),
    Chart(
        "Reward accuracy",
        "share with a margin above 0",
        (("rewards/accuracy", "accuracy"),),
        "From a coin's 0.5 up, and below 1.",
        (0.5, "a coin"),
    ),
    Chart(LOSS, "", (("loss", "loss"),), "Begins at l(0) in each iteration, where policy and opponent are the same."),
    Chart(
        "Log-prob per token",
        "nats",
        tuple((f"logps_per_token/{of}", of) for of in _BOTH),
        "The real one rises or stays. Where both fall, raise beta or lower the learning rate.",
    ),
    Chart("Log-prob of a response", "nats", tuple((f"logps/{of}", of) for of in _BOTH), "A sum over its tokens."),
    Chart(
        "KL from the opponent",
        "nats a token, estimated",
        (("kl/generated", "generated"),),
        "Some hundredths. Above 1 the policy has run away.",
        (0.0, "the opponent"),
    ),
    Chart("Entropy of the next token", "nats", tuple((f"entropy/{of}", of) for of in _BOTH), "Moves slowly."),
    Chart(
        "Length of responses, by batch",
        "tokens",
        tuple((f"lengths/{of}", of) for of in _BOTH),
        "Changes with the opponent, not within an iteration.",
    ),
    Chart("Gradient norm", "before it is clipped", (("grad_norm", "norm"),), "Neither 0 nor growing."),
    Chart("Speed", "tokens a second", (("tokens_per_second", "tokens a second"),), "Constant after the first steps."),
)


def html(record: RunRecord) -> dict[str, str]:
    """The page of one run."""
    return {FILE: page({record.workdir.name: record})}


def page(records: Mapping[str, RunRecord], prompts: int = responses.PROMPTS) -> str:
    """The page of runs, by names that tell them apart. Text that a model wrote is escaped, in the page and in the JSON
    inside of it; and no script but the page's own is run by a browser, by its hash.

    Args:
        prompts: of each run, how many are shown at most.
    """
    files = importlib.resources.files("spin_jax.reports")
    style, script = ((files / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files / "page.html").read_text(encoding="utf-8"))
    runs = [{"name": name, **_run(record)} for name, record in records.items()]
    browser = [{"name": name, **responses.prompts(record, prompts)} for name, record in records.items()]
    text = template.render(
        runs=runs,
        scores=_scores(records),
        charts=[chart for chart in (_chart(chart, records) for chart in CHARTS) if chart],
        trends=_trends(records),
        spreads=_spreads(records),
        settings=_settings(records),
        unread=list(dict.fromkeys(line for record in records.values() for line in record.unread)),
        browser=browser,
        characters=responses.CHARACTERS,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return text.encode("utf-8", "replace").decode()  # half a character is none


# ---- what a run is, and what it took


def _run(record: RunRecord) -> dict[str, Any]:
    trained = [row["iteration"] for row in record.results if row["iteration"] is not None]
    planned = record.config.get("iterations")
    of = f" of {planned}" if isinstance(planned, int) else ""
    steps = {t: int(rows[-1]["step"]) for t, rows in record.metrics.items()}
    facts = {"iterations": f"{len(trained)}{of} finished"}
    if going := [t for t in steps if t not in trained]:
        facts["under way"] = f"iteration {going[-1]}, step {steps[going[-1]]:,}"
    if trained:
        facts["last policy"] = f"{record.workdir}/iteration_{trained[-1]}/model"
    facts |= {name: str(record.config[name]) for name in ("model.path", "data.train") if name in record.config}
    start = next((row for row in reversed(record.timing) if "devices" in row), {})
    facts["hardware"] = str(start.get("devices", "not noted"))
    if start:
        facts["software"] = f"jax {start.get('jax')}, Python {start.get('python')}"
        facts["processes"] = str(start.get("processes"))
    tasks = scores(record).get("scores.txt", "")
    parts = {"tasks": tasks, "time": _time(record), "flops": _flops(record)}
    return {"facts": facts, "models": len(record.results), **parts}


def _time(record: RunRecord) -> dict[str, Any] | None:
    spent = timing.spent(record.timing)
    if spent is None:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in spent.loops))
    columns = sorted({t for _, t in spent.loops if t is not None})
    columns = ([None] if any(t is None for _, t in spent.loops) else []) + columns
    rows = {kind: [spent.loops.get((kind, t)) for t in columns] for kind in kinds}
    shown = [(kind, [*map(_duration, own), _duration(sum(filter(None, own)))]) for kind, own in rows.items()]
    between = max(0.0, spent.wall - sum(spent.loops.values()))
    shown.append(("between: loading, exporting", [""] * len(columns) + [_duration(between)]))
    return {
        "names": ["all" if t is None else f"{ITERATION}{t}" for t in columns],
        "rows": shown,
        "wall": _duration(spent.wall),
        "useful": f"{100 * spent.useful / spent.wall:.0f}%" if spent.wall else "-",
        "share": min(1.0, spent.useful / spent.wall) if spent.wall else 0.0,
        "starts": spent.starts,
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02.0f} s" if minutes else f"{seconds:.1f} s"


def _flops(record: RunRecord) -> list[dict]:
    """Of each iteration that has a result: petaflops in all, and of training; TFLOP/s while it trained."""
    found = []
    for row in record.results:
        if row["iteration"] is not None and SPENT in row:
            timed = [one for one in record.metrics.get(row["iteration"], []) if one.get("seconds")]
            seconds = sum(one["seconds"] for one in timed)
            flops = sum(one.get("model_tflops_per_second", 0.0) * one["seconds"] for one in timed) * 1e12
            training = [flops / PETA, max(0.0, row[SPENT] - flops / PETA), flops / seconds / 1e12] if seconds else []
            numbers = [row[SPENT], *training]
            found.append({"model": row["model"], "numbers": [f"{number:.4g}" for number in numbers]})
    return found


# ---- scores


def _scores(records: Mapping[str, RunRecord]) -> dict[str, Any]:
    """A row for each measure, a column for each model of each run. A measure whose name ends in `_stderr` is the
    standard error of the one before, and stands beside it."""
    results = [row for record in records.values() for row in record.results]
    hidden = ("model", "iteration")
    names = dict.fromkeys(name for row in results for name in row if name not in hidden and not name.endswith(STDERR))
    values = {name: ([row.get(name) for row in results], [row.get(name + STDERR) for row in results]) for name in names}
    rows = [(name, cells(*of_name)) for name, of_name in values.items()]
    return {"models": [str(row["model"]) for row in results], "rows": rows}


def _trends(records: Mapping[str, RunRecord]) -> list[dict]:
    """Measures of models over iterations, where two differ; those of pairs are in other figures."""
    results = [row for record in records.values() for row in record.results]
    names = dict.fromkeys(name for row in results for name, value in row.items() if isinstance(value, float))
    drawn = []
    for name in names:
        values = [row[name] for row in results if isinstance(row.get(name), float)]
        elsewhere = (SPENT, "held_out/rewards/", "generated/", "last_step/")
        if len(set(values)) > 1 and not name.endswith(STDERR) and not name.startswith(elsewhere):
            drawn_of_run = [(run, _trend(name, record, Range.of(values))) for run, record in records.items()]
            figures = [(run, *figure) for run, figure in drawn_of_run if figure]
            drawn.append({"title": name, "unit": "", "note": "", "rules": [], "figures": figures})
    return drawn


def _trend(name: str, record: RunRecord, y: Range) -> tuple[list[str], Any] | None:
    """(labels, figure): the policies, and beside them models that are numbered as they are, such as SFT controls."""
    lines: dict[str, list] = {"policy": []}
    start: list = []
    places: dict[float, str] = {}
    for row in record.results:
        named = re.fullmatch(r"(.*?) ?(\d+)?", str(row["model"]))
        at = -1.0 if named is None or named[2] is None else float(named[2])
        places[at] = "start" if at < 0 else str(int(at))
        if named and isinstance(row.get(name), float):
            point = (at, row[name], row.get(name + STDERR))
            line = "policy" if row["iteration"] is not None else named[1]
            (start if at < 0 else lines.setdefault(line, [])).append(point)
    series = [Series(label, (), [*start, *points]) for label, points in lines.items() if points]
    series = series or ([Series("start", (), start)] if start else [])
    return ([one.label for one in series], svg.scores(series, dict(sorted(places.items())), y)) if series else None


# ---- training


def _chart(chart: Chart, records: Mapping[str, RunRecord]) -> dict | None:
    """Figures of the runs that have logged it, on the same scales."""
    if chart.curves == (("loss", "loss"),) and _logged(records, "loss/objective"):
        chart = chart._replace(unit="without the NLL term", curves=(("loss/objective", "loss"),))
    if not any(_logged(records, metric) for metric, _ in chart.curves):
        return None
    drawn = {name: _curves(chart, record) for name, record in records.items() if record.metrics}
    x = Range(0.0, max(float(end) for _, _, bounds in drawn.values() for _, end in bounds.values()))
    values = [value for series, rules, _ in drawn.values() for value in _levels(series, rules)]
    y = Range.of(values)
    figures = [
        (name, [one.label for one in series], svg.curves(series, x, y, bounds, rules))
        for name, (series, rules, bounds) in drawn.items()
    ]
    ruled = dict.fromkeys(what for _, rules, _ in drawn.values() for *_, what in rules)
    note = "" if chart.title == LOSS and not ruled else chart.note  # an objective may begin anywhere
    return {"title": chart.title, "unit": chart.unit, "note": note, "rules": list(ruled), "figures": figures}


def _logged(records: Mapping[str, RunRecord], metric: str) -> bool:
    return any(metric in row for record in records.values() for rows in record.metrics.values() for row in rows)


def _levels(series: list[Series], rules: list[tuple]) -> list[float]:
    levels = [level for _, _, level, _ in rules] + [value for one in series for _, value, _ in one.points]
    return levels + [value for one in series for _, values in one.parts for value in values]


def _curves(chart: Chart, record: RunRecord) -> tuple[list[Series], list[tuple], dict]:
    """(series, rules, first and last step of each iteration). Steps are counted over the whole run; a result's
    `held_out/METRIC` is a point at the end of its iteration."""
    bounds, first = {}, 0
    for t, rows in record.metrics.items():
        bounds[t] = (first, first := first + int(rows[-1]["step"]))
    held_out = {row["iteration"]: row for row in record.results if row["iteration"] in bounds}
    series = []
    for metric, label in chart.curves:
        parts = []
        for t, rows in record.metrics.items():
            values = np.array([row.get(metric) for row in rows], dtype=float)  # None becomes NaN: a gap
            parts.append((bounds[t][0] + np.array([row["step"] for row in rows], float), values))
        measured = [(bounds[t][1], row.get(f"held_out/{metric}")) for t, row in held_out.items()]
        points = [(float(end), value, None) for end, value in measured if isinstance(value, float)]
        series.append(Series(label, parts, points))
    rules = [(0.0, float(first), *chart.rule)] if chart.rule else []
    if chart.title == LOSS:
        rules = [(*bounds[t], level, f"l(0) = {level:.4f}") for t, level in _at_start(record, chart.curves[0][0])]
    return series, rules, {f"{ITERATION}{t}": ends for t, ends in bounds.items()}


def _at_start(record: RunRecord, metric: str) -> list[tuple[int, float]]:
    """(iteration, l(0)): its first step's loss, if policy and opponent were the same function then, so that all
    margins were 0."""
    firsts = [(t, rows[0]) for t, rows in record.metrics.items()]
    return [
        (t, row[metric])
        for t, row in firsts
        if row["step"] == 1 and row.get("rewards/margin") == 0 and isinstance(row.get(metric), float)
    ]


def _spreads(records: Mapping[str, RunRecord]) -> list[dict]:
    """Histograms of rewards and of lengths, by iteration, of all runs on the same scale."""
    pairs = {name: responses.rewards(record) for name, record in records.items()}
    rewards = {
        name: {t: {of: np.array([line[f"rewards/{of}"] for line in lines]) for of in _BOTH} for t, lines in own.items()}
        for name, own in pairs.items()
    }
    lengths = {name: responses.lengths(record) for name, record in records.items()}
    drawn = []
    for title, unit, values, whole in (
        ("Rewards of held-out pairs", "beta log(policy / opponent), nats; height: share of pairs", rewards, False),
        ("Lengths of responses", "tokens; height: share of responses", lengths, True),
    ):
        by_run = {
            name: {t: own for t, own in found.items() if any(map(len, own.values()))} for name, found in values.items()
        }
        every = [one for found in by_run.values() for own in found.values() for one in own.values()]
        if every:
            x = Range.of(np.concatenate(every))
            x = Range(max(0.0, x.low), x.high) if whole else x
            figures = [
                (f"{name}, {ITERATION}{t}" if len(records) > 1 else f"{ITERATION}{t}", list(own))
                + (svg.histogram(own, x, whole, None if whole else 0.0),)
                for name, found in by_run.items()
                for t, own in found.items()
            ]
            drawn.append({"title": title, "unit": unit, "figures": figures})
    return drawn


# ---- settings


def _settings(records: Mapping[str, RunRecord]) -> dict[str, Any]:
    """Fields that differ from their defaults, or between the runs; and all others."""
    defaults = as_json(Config())
    changed, others = [], []
    for name, default in defaults.items():
        values = [record.config.get(name, default) for record in records.values()]
        differs = any(value != values[0] for value in values)
        row = {"name": name, "default": default, "values": values, "differs": differs, "doc": FIELDS[name].doc}
        (changed if any(value != default for value in values) else others).append(row)
    return {"changed": changed, "others": others, "known": any(record.config for record in records.values())}
