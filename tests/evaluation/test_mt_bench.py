"""MT-Bench: answers in FastChat's layout, a judge behind a real HTTP endpoint, and what its scores come to."""

import collections
import http.server
import json
import logging
import math
import re
import statistics
import threading

import pytest
import tiny_files
from absl.testing import flagsaver

from spin_jax import mt_bench as command
from spin_jax.errors import UserError
from spin_jax.evaluation import interface, judge, mt_bench
from spin_jax.runtime import cli

KEY = "sk-never-to-be-seen-0123456789"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Write {again}."]},
    {"question_id": 101, "category": "math", "turns": ["1+1?", "And 2+2?"], "reference": ["2", "4"]},
    {"question_id": 151, "category": "humanities", "turns": ["Who?", "Why?"]},
    {"question_id": 152, "category": "humanities", "turns": ["When?", "Where?"]},
]
# The fields that FastChat's common.py writes, in play_a_match_single and play_a_match_pair.
SINGLE = ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
PAIR = ["question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge", "g1_user_prompt", "g1_judgment"]
PAIR += ["g2_user_prompt", "g2_judgment", "turn", "tstamp"]


def judge_prompts() -> list[dict]:
    """The eight that FastChat has, in fewer words."""
    rows = []
    for kind, shown in (("single", ("answer",)), ("pair", ("answer_a", "answer_b"))):
        for name, reference in (("v1" if kind == "single" else "v2", ""), ("math-v1", "<{ref_answer_1}>")):
            one = "Q {question} " + reference + "".join(f" ({{{field}}})" for field in shown)
            two = "Q {question_1} {question_2} " + reference.replace(">", "|{ref_answer_2}>")
            two += "".join(f" ({{{field}_1}}) ({{{field}_2}})" for field in shown)
            for suffix, template in (("", one), ("-multi-turn", two)):
                rows.append({"name": f"{kind}-{name}{suffix}", "system_prompt": "Judge.", "prompt_template": template})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    (directory / "mt_bench/reference_answer").mkdir(parents=True)
    tiny_files.write_jsonl(directory / "mt_bench/question.jsonl", QUESTIONS)
    reference = {"question_id": 101, "choices": [{"index": 0, "turns": ["two", "four"]}]}
    tiny_files.write_jsonl(directory / "mt_bench/reference_answer/gpt-4.jsonl", [reference])
    tiny_files.write_jsonl(directory / "judge_prompts.jsonl", judge_prompts())
    return directory


def write_answers(out, model: str, ratings: dict[int, tuple[int, int]]) -> None:
    """Answers that say how the judge shall rate them."""
    questions = [mt_bench.Question(one["question_id"], one["category"], tuple(one["turns"])) for one in QUESTIONS]
    turns = [[mt_bench.Turn(f"{model} rate={rating}", 3, False) for rating in ratings[one.id]] for one in questions]
    mt_bench.write_answers(mt_bench.answers_file(out, model), model, questions, turns)


# ---- the endpoint


class Endpoint:
    """A judge on this machine: rates the last answer of a prompt as that says, or prefers the higher of two. `trouble`
    is what it does instead: (the user turn, how often it was asked that before) -> (status, headers, body), or None."""

    def __init__(self, trouble=lambda text, before: None):
        endpoint = self
        self.trouble, self.asked, self.keys = trouble, [], set()
        self._count, self._lock = collections.Counter(), threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, answer = endpoint.answer(self.path, body, self.headers)
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def answer(self, path: str, body: dict, headers) -> tuple[int, dict, bytes]:
        assert path == "/v1/chat/completions"
        system, user = body["messages"]
        assert system == {"role": "system", "content": "Judge."} and user["role"] == "user"
        with self._lock:
            before = self._count[user["content"]]
            self._count[user["content"]] += 1
            self.asked.append(body)
            self.keys.add(headers["Authorization"])
        if trouble := self.trouble(user["content"], before):
            return trouble
        rates = [int(rate) for rate in re.findall(r"rate=(-?\d+)", user["content"])]
        if len(set(re.findall(r"(\w+) rate=", user["content"]))) == 2:
            a, b = rates[len(rates) // 2 - 1], rates[-1]
            return said(f"Thus [[{'A' if a > b else 'B' if b > a else 'C'}]]")
        return said(f"Rating: [[{rates[-1]}]]")

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def said(text: str | None) -> tuple[int, dict, bytes]:
    message = {"role": "assistant", "content": text}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return 200, {}, json.dumps(body | {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}).encode()


def run(*words: object) -> int:
    """The command, in this process."""
    with flagsaver.flagsaver():
        cli.parse_flags(["mt_bench", *map(str, words)])
        return command.main([])


def judging(data, out, endpoint, *more: object) -> list[object]:
    given = ["--judge=judges/one", f"--data={data}", f"--out={out}", f"--judge_url={endpoint.url}"]
    return [*given, "--key_variable=TEST_KEY", *more]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY + "\n")


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- answers


def test_temperatures_are_those_of_the_categories(data):
    """One call a temperature and turn."""
    calls = []

    class Codec:
        decode = staticmethod(lambda ids: " text ")

    class Chat:
        codec = Codec
        generation_prompt = staticmethod(lambda messages: [len(messages)])

    def sample(prompts, turn, **fields):
        calls.append((turn, fields["temperature"], sorted(prompts), {ids[0] for ids in prompts.values()}))
        assert fields["max_new_tokens"] == 9 and fields["top_k"] == 50
        response = collections.namedtuple("Response", "row tokens truncated")
        return [response(row, [1, 2], False) for row in prompts]

    answers = mt_bench.answer(mt_bench.read_questions(data), Chat, sample, 9)
    assert answers == [[mt_bench.Turn("text", 2, False)] * 2] * 4
    first, second = ([call for call in calls if call[0] == turn] for turn in (0, 1))
    assert first == [(0, 0.0, [1], {1}), (0, 0.1, [2, 3], {1}), (0, 0.7, [0], {1})]
    assert second == [(1, 0.0, [1], {3}), (1, 0.1, [2, 3], {3}), (1, 0.7, [0], {3})]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "needs questions: set --config.evaluate.mt_bench to a copy of FastChat's llm_judge/data"),
        ({"evaluate.mt_bench": "/nowhere"}, "/nowhere/mt_bench/question.jsonl: not found; give a copy of fastchat"),
        ({"evaluate.mt_bench": "/nowhere", "data.template": "paper"}, "set --config.data.template=chat"),
    ],
)
def test_a_run_without_questions_is_refused(changes, says, tmp_path):
    named = {"evaluate.evaluators": ("mt_bench",)}
    with pytest.raises(UserError, match=re.escape(says)):
        interface.chosen(tiny_files.make_config("not read", "not read", named | changes))


# ---- the judge


def troubled(text: str, before: int) -> tuple[int, dict, bytes] | None:
    """Each kind of trouble once or twice for some prompt, and one prompt that never gets a rating."""
    at_once = {"retry-after-ms": "1"}
    echo = json.dumps({"error": {"message": f"no {KEY}"}}).encode()
    if "Q Write." in text and "again" not in text and before < 2:
        return 500, at_once, echo
    if "Q 1+1? <two>" in text and before == 0:
        return 429, at_once, echo
    if "again" in text and before == 0:
        return 200, {}, b"{garbage"
    if "Q Who? Why?" in text and before == 0:
        return 200, {"Content-Type": "text/html"}, b"<html>"
    if "Q When?  (" in text and before == 0:
        return said(None)
    if "Q When? Where?" in text:
        return said(f"I was told {KEY} and 12: [[12]]")
    return None


def test_single(data, tmp_path, capsys, caplog):
    """Through errors, garbage and missing ratings; killed in a line, it goes on with what is missing; the key is
    nowhere."""
    write_answers(tmp_path, "sft", {81: (5, 4), 101: (2, 1), 151: (7, 6), 152: (8, 3)})
    write_answers(tmp_path, "spun", {81: (6, 4), 101: (4, 1), 151: (9, 10), 152: (8, 9)})
    file = tmp_path / "model_judgment/judges__one_single.jsonl"
    with Endpoint(troubled) as endpoint, caplog.at_level(logging.DEBUG, "spin_jax"):
        flags = judging(data, tmp_path, endpoint, "--models=sft,spun", "--parallel=3")
        assert run(*flags, "--dry_run", "--price_in=30", "--price_out=60") == 0
        said_before = capsys.readouterr().out
        assert not endpoint.asked and "0 judgments are there; 16 calls, at most " in said_before
        tokens = int(re.search(r"at most ([\d,]+) tokens of prompts", said_before)[1].replace(",", ""))
        cost = (30 * tokens + 60 * 16 * 2048) / 1e6
        assert f"and {16 * 2048:,} of replies (2,048 each): at most {cost:.2f} at these prices" in said_before
        assert run(*flags) == 0
        told = capsys.readouterr().out
        # Of 16 judgments of two models: 500 twice, 429, two that are no completion, an empty one, and one asked again.
        assert len(endpoint.asked) == 16 + 2 * (2 + 1 + 2 + 1 + 2)
        assert all(one["max_tokens"] == 2048 and one["model"] == "judges/one" for one in endpoint.asked)
        assert {one["temperature"] for one in endpoint.asked} == {0, judge.ASKED_AGAIN_AT}
        assert endpoint.keys == {f"Bearer {KEY}"}
        assert "2 of 16 judgments have no verdict, and are left out" in told

        rows = lines(file)
        assert len(rows) == 16 and all(list(row) == SINGLE for row in rows)
        names = {row["question_id"]: row["judge"] for row in rows if row["turn"] == 2}
        assert names[101] == ["judges/one", "single-math-v1-multi-turn"]
        assert names[81] == ["judges/one", "single-v1-multi-turn"]
        (row,) = [row for row in rows if (row["question_id"], row["turn"], row["model"]) == (101, 2, "spun")]
        assert row["user_prompt"] == "Q 1+1? And 2+2? <two|four> (spun rate=4) (spun rate=1)"
        assert row["score"] == 1 and row["judgment"] == "Rating: [[1]]"
        unrated = [row for row in rows if row["score"] == -1]
        assert {(row["question_id"], row["turn"]) for row in unrated} == {(152, 2)} and len(unrated) == 2

        # The last four lines are lost, one of them in its middle.
        kept = file.read_text().splitlines(keepends=True)
        file.write_text("".join(kept[:12]) + kept[12][:40])
        endpoint.asked.clear()
        assert run(*flags) == 0
        prompts = {one["messages"][1]["content"] for one in endpoint.asked}
        assert prompts == {row["user_prompt"] for row in rows[12:]}
        again = lines(file)
        assert {(r["user_prompt"], r["score"]) for r in again} == {(r["user_prompt"], r["score"]) for r in rows}
        endpoint.asked.clear()
        capsys.readouterr()
        assert run(*flags) == 0 and not endpoint.asked
        assert "16 judgments are there; 0 calls" in capsys.readouterr().out
        write_answers(tmp_path, "spun", {81: (1, 1), 101: (4, 1), 151: (9, 10), 152: (8, 9)})
        with pytest.raises(UserError, match="question 81 was judged with another answer of spun: delete the file, or"):
            run(*flags)
    # FastChat's own means: of all lines but those with -1 (show_result.py).
    table = {
        (row["model"], row["turn"]): row
        for row in mt_bench.score_table(mt_bench.read_questions(data), rows, ["sft", "spun"])
    }
    for model in ("sft", "spun"):
        for turns, name in (((1,), "1"), ((2,), "2"), ((1, 2), "both")):
            theirs = [r["score"] for r in rows if r["score"] != -1 and r["model"] == model and r["turn"] in turns]
            assert table[model, name]["all"] == pytest.approx(statistics.mean(theirs))
    assert table["spun", "1"]["humanities"] == 8.5 and table["spun", "2"]["humanities"] == 10
    written = "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    assert KEY not in written + told + caplog.text and "[key] and 12" in written


def test_pairwise(data, tmp_path, capsys):
    """Both orders are asked; a judge that always prefers the first place ties, whatever it says."""
    write_answers(tmp_path, "sft", {81: (5, 5), 101: (2, 1), 151: (7, 6), 152: (8, 3)})
    write_answers(tmp_path, "spun", {81: (6, 4), 101: (4, 1), 151: (9, 9), 152: (8, 9)})

    def trouble(text, before):
        if "Q When? Where?" in text:
            return said("the first: [[A]]")
        return said("neither") if "Q Who? Why?" in text and text.index("sft") < text.index("spun") else None

    with Endpoint(trouble) as endpoint:
        flags = judging(data, tmp_path, endpoint, "--models=sft,spun", "--mode=pairwise")
        assert run(*flags) == 0
        assert len(endpoint.asked) == 8 * 2 + 2
    told = capsys.readouterr().out
    assert "16 calls" in told and "1 of 8 judgments have no verdict" in told
    rows = lines(tmp_path / "model_judgment/judges__one_pair.jsonl")
    assert all(list(row) == PAIR and (row["model_1"], row["model_2"]) == ("spun", "sft") for row in rows)
    found = {(row["question_id"], row["turn"]): (row["g1_winner"], row["g2_winner"]) for row in rows}
    assert found == {
        (81, 1): ("model_1", "model_1"),
        (81, 2): ("model_2", "model_2"),
        (101, 1): ("model_1", "model_1"),
        (101, 2): ("tie", "tie"),
        (151, 1): ("model_1", "model_1"),
        (151, 2): ("model_1", "error"),
        (152, 1): ("tie", "tie"),
        (152, 2): ("model_1", "model_2"),
    }
    (row,) = [row for row in rows if (row["question_id"], row["turn"]) == (101, 2)]
    assert row["judge"] == ["judges/one", "pair-math-v1-multi-turn"]
    assert row["g1_user_prompt"].endswith("<two|four> (spun rate=4) (spun rate=1) (sft rate=2) (sft rate=1)")
    assert row["g2_user_prompt"].endswith("<two|four> (sft rate=2) (sft rate=1) (spun rate=4) (spun rate=1)")
    (wins,) = mt_bench.win_table(rows, ["sft", "spun"])
    assert (wins["won"], wins["tied"], wins["lost"]) == (3, 3, 1)
    assert wins["win rate"] == pytest.approx(3 / 7) and wins["half ties"] == pytest.approx(4.5 / 7)


def test_what_stops_the_judge(data, tmp_path, capsys, caplog):
    """A wrong key, model or URL is one line, in which the key is not; what one prompt alone is refused for is not."""
    write_answers(tmp_path, "sft", {81: (5, 4), 101: (2, 1), 151: (7, 6), 152: (8, 3)})
    file = tmp_path / "model_judgment/judges__one_single.jsonl"

    def refused(status):
        return lambda *_: (status, {}, json.dumps({"error": {"message": f"{'x' * 270}{KEY}"}}).encode())

    for trouble, says in (
        (refused(401), "401.*; the same command again asks what is missing"),
        (refused(404), "404"),
        (refused(400), "400"),
        (lambda *_: (200, {"Content-Type": "text/html"}, b"<html>"), "is no chat completion: is --judge_url right"),
    ):
        with Endpoint(trouble) as endpoint:
            with pytest.raises(UserError, match=says) as caught:
                run(*judging(data, tmp_path, endpoint, "--models=sft", "--parallel=1"))
        assert "sk-never" not in str(caught.value)
        assert len(endpoint.asked) <= judge.ASKED, "nobody asks on after that"
    assert not file.read_text()
    with Endpoint(lambda text, before: refused(400)() if "Q Who?  (" in text else None) as endpoint:
        run(*judging(data, tmp_path, endpoint, "--models=sft", "--parallel=1"))
    assert [row["judgment"] for row in lines(file) if row["score"] == -1] == ["$ERROR$"]
    assert "sk-never" not in caplog.text + capsys.readouterr().out
    file.unlink()
    with (
        Endpoint(lambda text, before: refused(403)() if "Q When? Where?" in text else None) as endpoint,
        pytest.raises(UserError, match="403"),
    ):
        run(*judging(data, tmp_path, endpoint, "--models=sft", "--parallel=1"))
    assert len(lines(file)) == 7, "what was judged before is there"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give --model=DIR_OR_ID to answer with a model, or else --judge=MODEL to judge answers"),
        (["--model=x", "--judge=y"], "give --model=DIR_OR_ID to answer with a model, or else"),
        (["--judge=y", "--data=d", "--out=o"], "--models is missing: python -m spin_jax"),
        (["--judge=y", "--data=d", "--out=o", "--models=a,b/a.jsonl"], "names one twice"),
        (["--judge=y", "--data=d", "--out=o", "--models=a", "--mode=pairwise"], "name two at least"),
        (["--judge=y", "--data=d", "--out=o", "--models=a", "--price_in=1"], "--price_in and --price_out go together"),
        (["--judge=y", "--data=d", "--out=o", "--models=a"], "needs a key: put it into the environment variable"),
        (["--judge=y", "--data=/no", "--out=o", "--models=a", "--dry_run"], "/no/mt_bench/question.jsonl: not found"),
        (["--model=x", "--model_id=a b", "--data=d", "--out=o"], "'a b' names a file: write it in letters"),
    ],
)
def test_mistakes_of_one_line(words, says, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("sys.argv", ["mt_bench.py", *words])
    with pytest.raises(UserError, match=re.escape(says)):
        run(*words)


def test_a_key_in_the_place_of_its_variable_is_not_shown(data):
    with pytest.raises(UserError, match="do not write the key itself") as caught:
        run("--judge=y", f"--data={data}", "--out=o", "--models=a", f"--key_variable={KEY}")
    assert KEY not in str(caught.value)


# ---- scores


def test_replies():
    assert judge.rating("Rating: [[5]] or [[6]]") == 5 and judge.rating("so [[7.5]].") == 7.5
    assert judge.rating("[8]") == 8 and judge.rating("[[0]]") is judge.rating("5") is judge.rating("[[11]]") is None
    assert judge.winner("[[B]]") == "B" and judge.winner("[[C]]") == "tie" and judge.winner("A") is None


def test_errors_are_over_questions():
    """Where all questions have two turns: the standard deviation of their means over sqrt(n), by hand; a rating that is
    missing makes its question lighter."""
    values = {(1, 1): 4, (1, 2): 6, (2, 1): 8, (2, 2): 8, (3, 1): 2, (3, 2): 4}
    mean, error = mt_bench.mean_and_error(values)
    assert mean == pytest.approx(16 / 3) and error == pytest.approx(statistics.stdev([5, 8, 3]) / math.sqrt(3))
    del values[3, 2]
    mean, error = mt_bench.mean_and_error(values)
    residuals = [10 - 2 * mean, 16 - 2 * mean, 2 - mean]
    assert mean == 28 / 5 and error == pytest.approx(math.sqrt(3 / 2 * sum(x * x for x in residuals)) / 5)
    assert mt_bench.mean_and_error({(1, 1): 4, (1, 2): 6}) == (5, None) and mt_bench.mean_and_error({}) == (None, None)


def test_differences_are_paired():
    """A model that is better by 1 everywhere, but where a rating is missing, is so without any error."""
    questions = [mt_bench.Question(i, "math", ("a", "b")) for i in range(4)]
    judgments = [
        {"model": model, "question_id": i, "turn": turn, "score": i + turn + better}
        for model, better in (("sft", 0), ("spun", 1))
        for i in range(4)
        for turn in (1, 2)
    ]
    judgments[0]["score"] = -1
    rows = mt_bench.score_table(questions, judgments, ["sft", "spun"])
    assert [(row["model"], row["turn"]) for row in rows[2:4]] == [("sft", "both"), ("spun", "1")]
    assert rows[-1]["minus sft"] == 1 and rows[-1]["minus sft_stderr"] == 0 and rows[-1]["all_stderr"] > 0.5
    assert rows[2]["minus sft"] is None


# ---- FastChat's own files


def test_fastchats_prompts(assets):
    """All 80 questions with all eight prompts: each shows what it should, and references where they belong."""
    data = assets / "data/mt_bench"
    questions = mt_bench.read_questions(data)
    assert collections.Counter(one.category for one in questions) == dict.fromkeys(mt_bench.TEMPERATURES, 10)
    answers = {model: {one.id: (f"{model} 1", f"{model} 2") for one in questions} for model in ("old", "new")}
    names = collections.Counter()
    for mode, each in (("single", 2), ("pairwise", 1)):
        matches = judge.make_matches(data, questions, answers, mode)
        assert len(matches) == 160 * each
        names += collections.Counter(match.prompt for match in matches)
        assert judge.Cost.of(matches).calls == 320
        by_id = {one.id: one for one in questions}
        for match in matches:
            shown = by_id[match.question].turns[: match.turn]
            parts = [*shown, *(f"{model} {turn}" for model in match.models for turn in range(1, match.turn + 1))]
            assert all(part in asked for part in parts for asked in match.asked)
            assert "new 2" not in match.asked[0] or match.turn == 2
            assert ("Reference Answer" in match.asked[0]) == ("math" in match.prompt) == (101 <= match.question <= 130)
        if mode == "pairwise":
            assert all(match.models == ("new", "old") and len(set(match.asked)) == 2 for match in matches)
            assert all(m.asked[0].index("new 1") < m.asked[0].index("old 1") for m in matches)
            assert all(m.asked[1].index("new 1") > m.asked[1].index("old 1") for m in matches)
    assert names["single-v1"] == names["single-v1-multi-turn"] == 100 and names["pair-math-v1"] == 30
    assert len(names) == 8
