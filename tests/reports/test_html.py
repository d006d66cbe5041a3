"""The page of a run: all there is, text that stays text, and no more than a browser can hold."""

import html as html_lib
import json
import re
import shutil
import subprocess

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from absl.testing import flagsaver
from markupsafe import escape

from spin_jax import report
from spin_jax.errors import UserError
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import token_metrics
from spin_jax.objectives.logprobs import Scores
from spin_jax.reports import html, responses
from spin_jax.reports.record import RunRecord, write_result
from spin_jax.reports.scores import scores
from spin_jax.reports.summary import summary_table
from spin_jax.reports.task_scores import TaskScores
from spin_jax.runtime import cli
from spin_jax.runtime.metric_writer import to_json

HOSTILE = "</script><script>top.hacked = 1</script><img src=x onerror='top.hacked = 1'>\u2028 \ud83d & \"q\""
STEPS = 60  # of each iteration: enough for a running mean


def result(name: str, t: int | None, **values: float) -> dict:
    measured = {"held_out/nats_per_token": 1.2345, "judge": 4.5, "judge_stderr": 0.125}
    return {"model": name, "iteration": t, **measured, **values}


def write_lines(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(workdir, rows: int = 9, steps: int = STEPS, start: float = np.log(2)):
    """A run of two iterations, the second with a control, as its files would be."""
    rewards = {f"held_out/rewards/{of}": value for of, value in (("real", 0.25), ("generated", -0.75), ("margin", 1.0))}
    write_result(workdir, result("SFT", None))
    for t in (0, 1):
        directory = workdir / f"iteration_{t}"
        write_result(directory, result(f"iteration {t}", t, petaflops=80.0, **rewards, judge=5.25 + t))
        metrics = {"rewards/real": 0.1, "rewards/generated": -0.2, "seconds": 2.0, "model_tflops_per_second": 500.0}
        lines = [{"step": s, "loss": start, "rewards/margin": s / 100, **metrics} for s in range(1, steps + 1)]
        lines[0]["rewards/margin"] = 0.0
        (directory / "metrics.jsonl").write_text("".join(to_json(line) + "\n" for line in lines))
        tokens = {"lengths/real": 4, "lengths/generated": 6}
        pairs = [{"row": i, "rewards/real": float(i % rows), "rewards/generated": 2.0, **tokens} for i in range(rows)]
        write_lines(directory / "rewards.jsonl", pairs)
    write_result(workdir / "iteration_1" / "control", result("SFT control 1", None, judge=4.75))
    for name, policy in (("", "p0"), ("iteration_0", "p1"), ("iteration_1", "p2"), ("iteration_1/control", "c")):
        opponent = {"iteration_0": "p0", "iteration_1": "another"}.get(name, "o")
        same = {"prompt": [{"role": "user", "content": f"prompt {HOSTILE}"}], "real": HOSTILE, "opponent": opponent}
        lines = [{"row": i, **same, "policy": f"{policy} {HOSTILE}" if i == 3 else policy} for i in range(rows)]
        write_lines(workdir / name / "samples.jsonl", lines)
    write_lines(
        workdir / "timing.jsonl",
        [
            {"at": 100.0, "started": 100.0, "devices": "8 x TPU v4", "processes": 2, "jax": "0.11", "python": "3.12"},
            {"at": 200.0, "loop": "iteration 0: train", "seconds": 80.0, "useful_seconds": 60.0},
        ],
    )
    (workdir / "config.json").write_text(json.dumps({"iterations": 2, "spin.beta": [0.5], "model.path": HOSTILE}))
    return workdir


@pytest.fixture
def workdir(tmp_path):
    return write_run(tmp_path / "run")


def page_of(workdir) -> str:
    return html.html(RunRecord.load(workdir))["report.html"]


def browser(page: str) -> list[dict]:
    """What the page's script reads."""
    (found,) = re.findall(r'<script type="application/json" id="browser">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def figures(page: str, title: str) -> list[str]:
    """The pictures of a chart."""
    (section,) = re.findall(rf'<section class="chart">\s*<h3>{re.escape(title)}.*?</section>', page, re.DOTALL)
    return re.findall(r"<svg.*?</svg>", section, re.DOTALL)


# ---- numbers


def test_every_number_of_the_summary_is_there(workdir):
    page, results = page_of(workdir), RunRecord.load(workdir).results
    cells = re.findall(r"<td>(.*?)</td>", page)
    for line in summary_table(results).splitlines():
        for number in re.findall(r"-?\d+\.\d+", line):
            assert any(number in cell for cell in cells), number
    assert all(f'<th scope="col">{row["model"]}</th>' in page for row in results)
    assert "<td>4.500 ±0.125</td>" in page and "judge_stderr</th>" not in page


def test_scores_of_tasks_stand_there_as_in_scores_txt(workdir):
    task = {"values": {"acc<b>": 0.625}, "errors": {}, "questions": {}, "answers": [], "harness": {}}
    TaskScores(task="own", shots=None, key={}, **task).write(workdir / "iteration_1" / "lm_eval")
    page = page_of(workdir)
    assert str(escape(scores(RunRecord.load(workdir))["scores.txt"])) in page and "own acc&lt;b&gt;" in page


def test_what_the_run_cost(workdir):
    """60 of 100 seconds were useful; 60 steps of 2 s at 500 TFLOP/s are 60 of the 80 petaflops."""
    page = page_of(workdir)
    assert "8 x TPU v4" in page and "1 min 40 s" in page and "60% of it useful" in page
    (row,) = html._flops(RunRecord.load(workdir))[:1]
    assert row == {"model": "iteration 0", "numbers": ["80", "60", "20", "500"]}


# ---- curves


def test_rewards_of_both_are_in_one_picture(workdir):
    (picture,) = figures(page_of(workdir), "Rewards")
    assert re.findall(r'class="mean s(\d)" d="[^"]*" data-label="(\w+)"', picture) == [
        ("0", "real"),
        ("0", "real"),
        ("1", "generated"),
        ("1", "generated"),
    ]
    assert picture.count("<title>real: 0.25</title>") == 2 and picture.count("<title>generated: -0.75</title>") == 2
    assert picture.count("raw s0") == 2 and "iteration 1</text>" in picture


@pytest.mark.parametrize(("start", "told"), [(np.log(2), "l(0) = 0.6931"), (1.0, "l(0) = 1.0000")])
def test_a_line_at_the_loss_where_policy_and_opponent_are_the_same(tmp_path, start, told):
    page = page_of(write_run(tmp_path, start=start))
    (picture,) = figures(page, "Loss")
    assert picture.count('class="rule"') == 2 and picture.count(f"<title>{told}</title>") == 2
    assert f'<span class="key rule">{told}</span>' in page


def test_no_such_line_where_they_were_not_the_same(tmp_path):
    rows = [{"step": step, "loss": 3.0, "rewards/margin": 0.5} for step in (1, 2)]
    page = html.page({"run": RunRecord(tmp_path, {}, [], {0: rows})})
    assert "l(0)" not in page and 'class="rule"' not in figures(page, "Loss")[0]


def test_with_an_nll_term_the_curve_is_the_objectives_own_part(tmp_path):
    rows = [{"step": step, "loss": 3.0, "loss/objective": 0.6931, "rewards/margin": 0.0} for step in (1, 2)]
    page = html.page({"run": RunRecord(tmp_path, {}, [], {0: rows})})
    assert "without the NLL term" in page and "l(0) = 0.6931" in page


def test_steps_are_counted_over_the_run(tmp_path):
    rows = [{"step": step, "loss": 0.1 * step, "rewards/margin": None} for step in range(2, 11, 2)]
    held_out = [{"model": "iteration 1", "iteration": 1, "held_out/loss": 0.75}, {"model": "x", "iteration": 11}]
    record = RunRecord(tmp_path, {}, held_out, {t: rows for t in (0, 1, 10)})
    (series,), _, bounds = html._curves(html.CHARTS[3], record)
    assert [list(steps) for steps, _ in series.parts] == [[first + 2 * i for i in range(1, 6)] for first in (0, 10, 20)]
    assert series.points == [(20.0, 0.75, None)]
    assert bounds == {"iteration 0": (0, 10), "iteration 1": (10, 20), "iteration 10": (20, 30)}


def test_curves_of_tokens_are_what_objectives_log():
    x_BPY = np.ones((1, 1, 2), np.float32)
    logged = token_metrics(OBJECTIVES["logistic"], Scores(x_BPY, x_BPY, x_BPY), x_BPY, x_BPY)
    drawn = {metric for chart in html.CHARTS for metric, _ in chart.curves}
    assert {metric for metric in logged if not metric.startswith("token_accuracy/")} <= drawn


# ---- text


def test_what_a_model_writes_stays_text(workdir):
    page = page_of(workdir)
    assert "<script>top" not in page and "<img" not in page and page.count("<script") == page.count("</script>") == 2
    assert str(escape(HOSTILE[:70])) in page, "the model's path, among the settings"
    (run,) = browser(page)
    (row,) = [one for one in run["rows"] if one["row"] == 3]
    assert row["real"] == HOSTILE and row["prompt"] == [["user", f"prompt {HOSTILE}"]]
    assert row["answers"][0] == ["SFT", f"p0 {HOSTILE}", False]
    result_of_hostile = {"model": HOSTILE, "iteration": None, HOSTILE: 1.0}
    record = RunRecord(workdir, {"iterations": HOSTILE}, [result_of_hostile], {}, unread=[HOSTILE])
    hostile = html.page({HOSTILE: record})
    assert "<script>top" not in hostile and "<img" not in hostile


def test_an_opponent_is_the_policy_before_it_unless_it_wrote_something_else(workdir):
    (run,) = browser(page_of(workdir))
    assert [answer[:2] for answer in run["rows"][0]["answers"]] == [
        ["SFT, opponent of iteration 0", "p0"],
        ["iteration 0", "p1"],
        ["opponent of iteration 1", "another"],
        ["iteration 1", "p2"],
        ["SFT control 1", "c"],
    ]
    assert run["rows"][5]["margins"] == [[0, 3.0], [1, 3.0]]


def test_of_many_prompts_the_worst_the_best_and_some_between_are_shown(tmp_path):
    record = RunRecord.load(write_run(tmp_path, rows=1000))
    shown = responses.prompts(record, most=30)
    rows = [one["row"] for one in shown["rows"]]
    assert shown["total"] == 1000 and len(rows) == len(set(rows)) == 30
    assert set(rows) > {*range(10), *range(990, 1000)} and max(np.diff(sorted(rows))) < 150
    assert len(responses.prompts(record)["rows"]) == responses.PROMPTS
    assert [one["row"] for one in responses.prompts(record, most=5000)["rows"]] == list(range(1000))


def test_a_long_text_is_cut(tmp_path):
    line = {"row": 0, "prompt": [], "real": "x" * 10_000, "opponent": "", "policy": "y" * responses.CHARACTERS}
    write_lines(tmp_path / "samples.jsonl", [line])
    (row,) = responses.prompts(RunRecord.load(tmp_path))["rows"]
    assert row["real"].endswith("xx ... (6,000 more characters)") and len(row["answers"][0][1]) == responses.CHARACTERS


def test_without_held_out_prompts_pairs_are_shown(tmp_path):
    def turns(response: str) -> list[dict]:
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": response}]

    for t in (0, 1):
        columns = {
            "row": [7, 8],
            "real": [turns("r7"), turns("r8")],
            "generated": [turns(f"g{t}"), turns("")],
            "generated_truncated": [True, False],
            "generated_tokens": [[1, 2, 3], [4]],
        }
        (tmp_path / f"iteration_{t}" / "generated").mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"iteration_{t}" / responses.PAIRS)
    record = RunRecord.load(tmp_path)
    first, _ = responses.prompts(record)["rows"]
    assert first["prompt"] == [["user", "q"]] and first["real"] == "r7"
    assert first["answers"] == [["opponent of iteration 0", "g0", True], ["opponent of iteration 1", "g1", True]]
    assert {t: found["generated"].tolist() for t, found in responses.lengths(record).items()} == {0: [3, 1], 1: [3, 1]}


# ---- runs that are not whole, and several


@pytest.mark.parametrize("made", [[], ["config.json"], ["iteration_0/metrics.jsonl"], ["samples.jsonl", "result.json"]])
def test_a_page_shows_what_there_is(workdir, tmp_path, made):
    part = tmp_path / "part"
    part.mkdir()
    for name in made:
        (part / name).parent.mkdir(exist_ok=True)
        shutil.copy(workdir / name, part / name)
    page = page_of(part)
    assert ("No model has been measured yet" in page) == ("result.json" not in made)
    assert ("No iteration has trained yet" in page) == ("iteration_0/metrics.jsonl" not in made)
    assert bool(browser(page)[0]["total"]) == ("samples.jsonl" in made) and "Left out" not in page
    assert "under way" in page if "iteration_0/metrics.jsonl" in made else "0 of 2" in page or "0 finished" in page


@pytest.mark.parametrize("content", [b"", b"[]", b'{"step"', b"\xff\xfe\n{}\n", b'{"row": 1}\n5\n'])
def test_damaged_files_are_left_out_and_named(workdir, content):
    names = ["config.json", "result.json", "samples.jsonl", "timing.jsonl"]
    names += [f"iteration_0/{name}" for name in ("metrics.jsonl", "rewards.jsonl", "samples.jsonl", responses.PAIRS)]
    (workdir / "iteration_0/generated").mkdir()
    for name in names:
        (workdir / name).write_bytes(content)
    page = html.page({"run": RunRecord.load(workdir, damaged=True)})
    told = re.findall(r"Left out: (.*)</p>", page)
    assert len(told) == len(set(told)) and any("config.json" in line for line in told)
    assert any("result.json" in line for line in told)
    assert "1.234" in page, "what is whole is there"


def test_the_same_record_makes_the_same_page(workdir):
    record = RunRecord.load(workdir)
    assert html.html(record) == html.html(record) == {"report.html": page_of(workdir)}


def test_runs_side_by_side_are_on_one_scale_and_their_settings_compared(workdir, tmp_path):
    other = write_run(tmp_path / "other", steps=30, start=2.0)
    (other / "config.json").write_text(json.dumps({"iterations": 2, "spin.beta": [5.0], "model.path": HOSTILE}))
    page = html.page({name: RunRecord.load(tmp_path / name) for name in ("run", "other")})
    for title in ("Loss", "Rewards", "judge"):
        pictures = figures(page, title)
        assert len(pictures) == 2
        assert len({re.findall(r'data-y="([^"]*)"', picture)[0] for picture in pictures}) == 1, title
    assert re.findall(r'<tr class="differs"><th scope="row">(.*?)</th>', page) == ["spin.beta"]
    assert [run["name"] for run in browser(page)] == ["run", "other"]
    assert page.count('<th class="run" colspan="4">') == 2


# ---- the command


def run(*words: str) -> int:
    with flagsaver.flagsaver():
        return report.main(cli.parse_flags(["report", *map(str, words)], words=True))


def test_the_command_writes_the_page(workdir, tmp_path, capsys):
    assert run(workdir) == 0 and (workdir / "report.html").read_text() == page_of(workdir)
    out = tmp_path / "both.html"
    assert run(workdir, tmp_path / "." / "run", f"--out={out}", "--max_prompts=2") == 0
    assert len(browser(out.read_text())[0]["rows"]) == 2
    assert capsys.readouterr().out == f"{workdir}/report.html\n{out}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no workdir is given: python -m spin_jax.report runs/quickstart"),
        (["{run}", "{run}"], "--out is missing: python -m spin_jax.report {run} {run} --out=report.html"),
        (["{run}/iteration_0"], "{run}/iteration_0 holds no run: name the directory that its --workdir named"),
        (["{run}/nowhere"], "{run}/nowhere holds no run"),
        (["{run}", "--max_prompts=-1"], "max_prompts"),
    ],
)
def test_what_the_command_refuses(workdir, words, message):
    with pytest.raises(UserError) as refused:
        run(*(word.format(run=workdir) for word in words))
    assert message.format(run=workdir) in str(refused.value)


# ---- in a browser

LOOKING = """<!doctype html><title>looking</title><pre id="told"></pre>
<iframe id="wide" width="1280" height="900" srcdoc="{page}"></iframe>
<iframe id="narrow" width="390" height="900" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const told = {{hacked: String(window.hacked)}};
  for (const id of ["wide", "narrow"]) {{
    const page = document.getElementById(id).contentDocument;
    const shown = () => [...page.querySelectorAll("#prompts .head span:first-child")].map((one) => one.textContent);
    const [first] = shown();
    const controls = page.getElementById("controls");
    controls.sort.value = "best";
    controls.search.value = "hacked";
    controls.search.dispatchEvent(new Event("input", {{bubbles: true}}));
    const picture = page.querySelector("#training svg");
    picture.dispatchEvent(new KeyboardEvent("keydown", {{key: "ArrowRight"}}));
    page.dispatchEvent(new KeyboardEvent("keydown", {{key: "/"}}));
    told[id] = {{
      fits: page.documentElement.scrollWidth <= page.documentElement.clientWidth,
      first, best: shown()[0], found: shown().length, focused: page.activeElement.name,
      text: page.querySelector(".answer.real div").textContent.slice(0, 20),
      read: page.querySelector("#training output").textContent,
      images: page.images.length,
    }};
  }}
  document.getElementById("told").textContent = JSON.stringify(told);
}});
</script>"""


def test_in_a_browser_it_fits_answers_and_stays_quiet(workdir, tmp_path):
    """At 1280 and 390 pixels; no line on the console, where whatever the page's policy forbids would be told, too."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine")
    looking = tmp_path / "looking.html"
    looking.write_text(LOOKING.format(page=html_lib.escape(page_of(workdir))), encoding="utf-8", errors="replace")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
    command = [chromium, *flags, "--enable-logging=stderr", "--dump-dom", looking.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ":CONSOLE" not in ran.stderr, ran.stderr
    (told,) = re.findall(r'<pre id="told">(.*?)</pre>', ran.stdout, re.DOTALL)
    seen = {"fits": True, "first": "row 0", "best": "row 8", "found": 9, "focused": "search", "images": 0}
    seen |= {"text": HOSTILE[:20], "read": "1: real 0.1, generated -0.2"}
    assert json.loads(html_lib.unescape(told)) == {"hacked": "undefined", "wide": seen, "narrow": seen}
