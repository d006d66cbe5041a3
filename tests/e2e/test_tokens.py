"""Token ids are made once, and never served for another text, tokenizer or template."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import tiny_files
from etils import epath

from spin_jax.data.sources import Skip
from spin_jax.data.tokenize import tokenise, tokenise_once
from spin_jax.errors import UserError
from spin_jax.self_play.run import open_run


def open_tiny(model, data, workdir, **changes):
    return open_run(tiny_files.make_config(model, data, changes), workdir)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """All texts that tokenizers are called with from here on."""
    texts = []
    tokenizer = type(tiny_files.character_tokenizer())
    call = tokenizer.__call__

    def watched(self, text, **options):
        texts.append(text)
        return call(self, text, **options)

    monkeypatch.setattr(tokenizer, "__call__", watched)
    return texts


def test_a_second_start_tokenises_no_row(tiny_model, tiny_data, tmp_path, asked):
    first = open_tiny(tiny_model, tiny_data, tmp_path)
    examples = first.train_examples + first.held_out_examples
    assert all(any(example.prompt[0]["content"] in text for text in asked) for example in examples)
    del asked[:]
    second = open_tiny(tiny_model, tiny_data, tmp_path)
    assert not any(example.prompt[0]["content"] in text for text in asked for example in examples)
    assert set(second.tokens) == {example.row for example in examples}
    for example in examples:
        np.testing.assert_equal(second.tokens[example.row], tokenise(first.chat, example))
        again = [dataclasses.astuple(run.pair(example, ("abc", False), 0)) for run in (first, second)]
        np.testing.assert_equal(*again)


def test_another_template_gives_other_tokens(tiny_model, tiny_data, tmp_path):
    """A template that was mended in place, between two starts in one workdir."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    before = open_tiny(model, tiny_data, tmp_path / "run")
    changed = [file for file in model.iterdir() if tiny_files.TEMPLATE[:20] in _text(file)]
    assert changed
    for file in changed:
        file.write_text(_text(file).replace("':' +", "';' +").replace("'a:'", "'a;'"))
    after = open_tiny(model, tiny_data, tmp_path / "run")
    for example in after.train_examples:
        assert after.tokens[example.row].asked.tolist() != before.tokens[example.row].asked.tolist()
        np.testing.assert_equal(after.tokens[example.row], tokenise(after.chat, example))


def _text(file) -> str:
    return "" if file.suffix == ".safetensors" else file.read_text()


def test_other_text_or_another_format_gives_other_tokens(tiny_model, tiny_data, tmp_path):
    path, source = epath.Path(tmp_path / "tokens.npz"), epath.Path(tiny_model)
    runs = {
        template: open_tiny(tiny_model, tiny_data, tmp_path / template, **{"data.template": template})
        for template in ("chat", "paper")
    }
    examples = runs["chat"].train_examples
    others = [dataclasses.replace(examples[0], response="other"), *examples[1:]]
    for template, asked_for in (("chat", examples), ("chat", others), ("chat", others[::-1]), ("paper", examples)):
        chat = runs[template].chat
        made = tokenise_once(path, source, template, chat, asked_for)
        np.testing.assert_equal(made, [tokenise(chat, example) for example in asked_for])


def test_long_prompts_are_cut_or_skipped_and_named(tiny_model, tiny_data, tmp_path, caplog):
    caplog.set_level("INFO", "spin_jax")
    every = open_tiny(tiny_model, tiny_data, tmp_path / "whole")
    lengths = {row: len(tokens.asked) for row, tokens in every.tokens.items()}
    longest = sorted(lengths.values())[-2] - 1
    short = {"data.max_prompt_length": longest, "data.eval_rows": 2, "train.batch_size": 8}
    cut = open_tiny(tiny_model, tiny_data, tmp_path / "cut", **short)
    for row in lengths:
        assert cut.asked(row).tolist() == every.asked(row).tolist()[-longest:]
    skipped = open_tiny(tiny_model, tiny_data, tmp_path / "skip", **short, **{"data.long_prompts": "skip"})
    kept = {example.row for example in skipped.train_examples + skipped.held_out_examples}
    assert kept == {row for row, length in lengths.items() if length <= longest} != set(lengths)
    assert f"prompt longer than {longest} tokens: {len(lengths) - len(kept)} (rows " in caplog.text


# ---- rows that the template refuses

SYSTEM_ROWS = (1, 4, 5, 20)
SYSTEM_PROMPT = ({"role": "system", "content": "S"}, {"role": "user", "content": "a"})


@pytest.fixture(scope="module")
def strict_model(tiny_model, tmp_path_factory):
    """A model whose template takes no system turn, as Gemma's does."""
    model = shutil.copytree(tiny_model, tmp_path_factory.mktemp("strict") / "model")
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    changed = [file for file in model.iterdir() if tiny_files.TEMPLATE[:20] in _text(file)]
    assert changed
    for file in changed:
        file.write_text(_text(file).replace(tiny_files.TEMPLATE[:20], refuse + tiny_files.TEMPLATE[:20], 1))
    return model


@pytest.fixture
def some_with_system(tmp_path):
    rows = [row | ({"system": "S"} if n in SYSTEM_ROWS else {}) for n, row in enumerate(tiny_files.make_rows())]
    return tiny_files.write_jsonl(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("long_prompts", ["keep_end", "skip"])
def test_rows_that_the_template_refuses_are_left_out_and_counted(
    strict_model, some_with_system, tmp_path, caplog, long_prompts, asked
):
    caplog.set_level("INFO", "spin_jax")
    changes = {"data.long_prompts": long_prompts, "train.epochs": 4.0}
    run = open_tiny(strict_model, some_with_system, tmp_path / "run", **changes)
    kept = {example.row for example in run.train_examples + run.held_out_examples}
    assert kept == set(range(tiny_files.TRAIN_ROWS + tiny_files.EVAL_ROWS)) - set(SYSTEM_ROWS) == set(run.tokens)
    assert len(run.held_out_examples) == tiny_files.EVAL_ROWS
    assert "24 rows: 20 used, 4 skipped" in caplog.text
    assert re.search(r"refuses these messages: System role not supported: 4 \(rows 1, 4, 5, 20\)", caplog.text)
    assert "of the rows cannot be used" not in caplog.text  # a sixth of them
    caplog.clear()
    del asked[:]
    again = open_tiny(strict_model, some_with_system, tmp_path / "run", **changes)
    assert [again.train_examples, again.held_out_examples] == [run.train_examples, run.held_out_examples]
    assert not any(example.response in text for example in again.train_examples for text in asked)
    assert "24 rows: 20 used, 4 skipped" in caplog.text  # said at each start


def test_refused_rows_leave_as_many_as_were_asked_for(strict_model, some_with_system, tmp_path):
    """The held-out rows are the same for any number of training rows, and a smaller set is part of a larger."""

    def rows(max_rows):
        changes = {"data.max_rows": max_rows, "data.eval_rows": 4, "train.epochs": 4.0}
        run = open_tiny(strict_model, some_with_system, tmp_path / str(max_rows), **changes)
        return [{example.row for example in part} for part in (run.train_examples, run.held_out_examples)]

    train, held_out = zip(*(rows(n) for n in (8, 12, 0)), strict=True)
    assert [len(part) for part in train] == [8, 12, 16]
    assert train[0] < train[1] < train[2]
    assert held_out[0] == held_out[1] == held_out[2] and len(held_out[0]) == 4


def test_a_template_that_refuses_every_row_stops_the_run(strict_model, tmp_path):
    rows = tiny_files.write_jsonl(tmp_path / "rows.jsonl", [row | {"system": "S"} for row in tiny_files.make_rows()])
    with pytest.raises(UserError, match=r"rows\.jsonl: no row can be used: .*System role not supported \(24 rows\)"):
        open_tiny(strict_model, rows, tmp_path / "run")


def test_tokens_are_made_until_there_are_enough(strict_model, some_with_system, tmp_path):
    run = open_tiny(strict_model, some_with_system, tmp_path / "run", **{"train.epochs": 4.0})
    good, bad = run.train_examples[:6], [dataclasses.replace(run.train_examples[0], row=99, prompt=SYSTEM_PROMPT)] * 2
    path, source = epath.Path(tmp_path / "tokens.npz"), epath.Path(strict_model)
    reason = "the tokenizer's chat template refuses these messages: System role not supported"
    for _ in range(2):  # made, then read
        made = tokenise_once(path, source, "chat", run.chat, [good[0], *bad, *good[1:]], enough=3)
        assert made[1:3] == [Skip(99, reason)] * 2 and len(made) == 5
        np.testing.assert_equal([made[0], *made[3:]], [tokenise(run.chat, example) for example in good[:3]])


def test_more_rows_than_there_are_and_few_that_can_be_used_are_warned_of(tiny_model, tmp_path, caplog):
    rows = [*tiny_files.make_rows(), *[{"prompt": "a", "response": ""}] * 45]
    data = tiny_files.write_jsonl(tmp_path / "rows.jsonl", rows)
    open_tiny(tiny_model, data, tmp_path / "run", **{"data.max_rows": 1000})
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{data}: 65% of the rows cannot be used: empty response (45 rows)",
        "--config.data.max_rows=1000: there are 16 rows to train on",
    ]


def test_a_row_with_half_a_character_is_trained_on(tiny_model, tmp_path, caplog):
    caplog.set_level("INFO", "spin_jax")
    rows = tiny_files.make_rows()
    rows[3] = {"prompt": "abc\ud83d", "response": "cb\ude00a"}
    run = open_tiny(tiny_model, tiny_files.write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    (example,) = [example for example in run.train_examples + run.held_out_examples if example.row == 3]
    assert (example.prompt[0]["content"], example.response) == ("abc\ufffd", "cb\ufffda")
    np.testing.assert_equal(run.tokens[3], tokenise(run.chat, example))
    assert "replaced by U+FFFD: 1 (rows 3)" in caplog.text
