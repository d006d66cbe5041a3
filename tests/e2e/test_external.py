"""Responses that another program writes: asked for in a file, checked, and as good as the run's own."""

import json
import pathlib

import pyarrow.parquet
import pytest
import tiny_files

from spin_jax.config import replace
from spin_jax.data.pairs import read_sampled
from spin_jax.errors import UserError
from spin_jax.runtime.preemption import Stopped
from spin_jax.self_play.algorithm import self_play
from spin_jax.self_play.run import open_run
from spin_jax.self_play.stages import external

ONE = {"iterations": 1, "evaluate.evaluators": ()}


def lines_of(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file: pathlib.Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def own(tmp_path_factory, tiny_model, tiny_data) -> pathlib.Path:
    """The workdir of a run that samples itself."""
    workdir = tmp_path_factory.mktemp("own")
    self_play(tiny_files.make_config(tiny_model, tiny_data, ONE), workdir)
    return workdir


@pytest.fixture
def asked(own, tiny_model, tiny_data, tmp_path):
    """(config of a run that waits for responses, its directory of them, the lines that `own`'s responses are)."""
    config = tiny_files.make_config(tiny_model, tiny_data, ONE | {"generate.source": "external"})
    with pytest.raises(Stopped, match="iteration 0 waits for responses: .* start the same command again"):
        self_play(config, tmp_path)
    directory = tmp_path / "iteration_0" / "generated"
    sampled = read_sampled(own / "iteration_0" / "generated" / "pairs.parquet")
    answers = []
    for line in lines_of(directory / external.PROMPTS):
        ids, truncated = sampled[line["row"]][line["number"]]
        answers.append({key: line[key] for key in ("row", "number", "request")})
        answers[-1] |= {"tokens": ids.tolist(), "truncated": truncated}
    return config, directory, answers


def test_the_same_responses_make_the_same_model(own, asked, tmp_path):
    config, directory, answers = asked
    request = json.loads((directory / external.REQUEST).read_text())
    assert (
        request["sampling"]["max_new_tokens"] == config.generate.max_new_tokens
        and request["sampling"]["stop_token_ids"]
    )
    run = open_run(config, tmp_path)
    assert [line["tokens"] for line in lines_of(directory / external.PROMPTS)] == [
        run.asked(example.row).tolist() for example in run.train_examples + run.held_out_examples
    ]
    write_lines(directory / external.RESPONSES, answers[::-1])  # in any order
    self_play(config, tmp_path)
    made, expected = (
        (workdir / "iteration_0" / "model" / "model.safetensors").read_bytes() for workdir in (tmp_path, own)
    )
    assert made == expected


def test_texts_become_the_ids_that_would_have_been_sampled(asked, tmp_path):
    config, directory, answers = asked
    decode = open_run(config, tmp_path).chat.codec.decode
    for answer in answers:
        answer["text"] = decode(answer.pop("tokens"))
    write_lines(directory / external.RESPONSES, answers)
    self_play(config, tmp_path)
    table = pyarrow.parquet.read_table(directory / "pairs.parquet").to_pydict()
    texts = {answer["row"]: answer["text"] for answer in answers}
    assert [turns[-1]["content"] for turns in table["generated"]] == [texts[row] for row in table["row"]]


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda lines: lines.pop(), r"1 of \d+ responses are missing \(row \d+ number 0"),
        (lambda lines: lines.append(lines[0]), r":25: row \d+, number 0 is there twice"),
        (lambda lines: lines[2].update(row=999), ":3: row 999, number 0 was not asked for: copy both from prompts"),
        (lambda lines: lines[2].update(request="other"), ":3: a response to request 'other', and row .* is now"),
        (lambda lines: lines[2].pop("row"), ":3: no field 'row'"),
        (lambda lines: lines[2].update(tokens=[5000]), ":3: tokens has token ids 5000"),
        (
            lambda lines: lines[2].update(tokens=[40], truncated=False),
            ":3: truncated=False, but the sampled ids do not end",
        ),
        (
            lambda lines: lines[2].update(tokens=[40] * 99, truncated=True),
            ":3: 99 tokens, and .*max_new_tokens=8 were asked",
        ),
        (lambda lines: lines[2].update(truncated="no"), ":3: truncated='no': write true or false"),
        (lambda lines: lines[2].update(tokens=None, text=5), ":3: text must be text, not int"),
        (lambda lines: lines.insert(2, [1]), ":3: a line must be an object with named fields, not list"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_line(asked, tmp_path, change, says):
    config, directory, answers = asked
    change(answers)
    write_lines(directory / external.RESPONSES, answers)
    with pytest.raises(UserError, match=says):
        self_play(config, tmp_path)
    assert not (directory / "pairs.parquet").exists()


def test_a_line_that_is_no_json_is_named(asked, tmp_path):
    config, directory, answers = asked
    write_lines(directory / external.RESPONSES, answers)
    with (directory / external.RESPONSES).open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"responses\.jsonl:25: "):
        self_play(config, tmp_path)


def test_responses_to_another_request_are_refused(asked, tmp_path):
    """Sampling may change as long as there are no responses; those that come were asked for otherwise."""
    config, directory, answers = asked
    write_lines(directory / external.RESPONSES, answers)
    with pytest.raises(UserError, match=r":1: .*: model, data or sampling changed; delete prompts.jsonl and responses"):
        self_play(replace(config, {"generate.temperature": 0.5}), tmp_path)


def test_texts_beyond_the_budget_are_cut_and_ids_behind_a_stop_id_refused(asked, tmp_path):
    config, directory, answers = asked
    stop = json.loads((directory / external.REQUEST).read_text())["sampling"]["stop_token_ids"][0]
    broken = [*answers[:-1], answers[-1] | {"tokens": [40, stop, 41, stop], "truncated": False}]
    write_lines(directory / external.RESPONSES, broken)
    with pytest.raises(UserError, match=":24: a stop id stands before the end: cut the response behind it"):
        self_play(config, tmp_path)
    long = {key: answers[-1][key] for key in ("row", "number", "request")} | {"text": "abc" * 99, "tokens": None}
    write_lines(directory / external.RESPONSES, [*answers[:-1], long])
    self_play(config, tmp_path)
    (ids, truncated), *_ = read_sampled(directory / "pairs.parquet")[long["row"]]
    assert len(ids) == config.generate.max_new_tokens and truncated
