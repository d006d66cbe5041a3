import json
import re

import numpy as np
import pytest
from data_rows import CHAT, assistant, system, user, write_lines

from spin_jax.data.sources import Example, Examples, Skip, as_messages, load_examples, load_prompts, split_examples
from spin_jax.errors import UserError

# ---- prompts, whose answers may be missing


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "q"}, "q"),
        ({"question": "q", "answer": "a"}, "q"),
        ({"instruction": "q"}, "q"),
        ({"instruction": "q", "input": "ctx"}, "q\n\nctx"),
        ({"instruction": "q", "input": "ctx", "answer": "a"}, "q\n\nctx"),
        ({"question": "q", "context": "ctx"}, "q\n\nctx"),
        ({"question": "q", "system_prompt": "S"}, [system("S"), user("q")]),
        ({"messages": CHAT}, CHAT[:4]),
        ({"messages": CHAT[:4]}, CHAT[:4]),
        ({"conversations": [{"from": "human", "value": "q"}]}, [user("q")]),
        ({"real": CHAT, "generated": CHAT}, CHAT[:4]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_prompt_needs_no_answer(tmp_path, row, prompt):
    assert load_prompts(write_lines(tmp_path / "a.jsonl", [row, row])) == [prompt, prompt]


def test_the_first_turn_of_a_conversation_as_a_prompt(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT[:4]}])
    assert load_prompts(source, turn="first") == [CHAT[:2]]


def test_prompts_of_data_are_those_that_a_run_asks(tmp_path):
    rows = [{"messages": CHAT}, {"messages": [user("q"), assistant("a")]}]
    source = write_lines(tmp_path / "a.jsonl", rows)
    for turn in ("first", "last"):
        prompts = [tuple(as_messages(prompt)) for prompt in load_prompts(source, turn=turn)]
        assert prompts == [example.prompt for example in load_examples(source, turn=turn).examples]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "a.jsonl: there are no rows"),
        ([{"prompt": "q"}, {"prompt": " "}, {"prompt": None}], "a.jsonl:2, 3: empty prompt"),
        ([{"prompt": "q"}, {"prompt": 5}], "a.jsonl:2: field 'prompt' must be text"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "a.jsonl:1: no user turn"),
        ([{"text": "q"}], "a.jsonl:1: columns text fit no known layout"),
        ([{"text": "q"}, {"prompt": 5}], "fit no known layout; accepted: .*; .*a.jsonl:2: field 'prompt' must be text"),
    ],
)
def test_rows_without_a_prompt_are_named(tmp_path, rows, message):
    with pytest.raises(UserError) as refused:
        load_prompts(write_lines(tmp_path / "a.jsonl", rows))
    assert re.search(message, str(refused.value))


# ---- rows that are left out, and said so


def test_unusable_rows_are_counted_with_their_numbers(tmp_path):
    answer, question = assistant("a"), user("q")
    rows = [
        [question, answer],
        [answer],
        [question],
        [question, {**answer, "content": " \n"}],
        [{**question, "content": ""}, answer],
        [{"role": "tool", "content": "x"}, question, answer],
        [question, answer, answer],
        None,
        [answer],
    ]
    found = load_examples(write_lines(tmp_path / "a.jsonl", [{"messages": row} for row in rows]))
    assert [example.row for example in found.examples] == [0]
    assert found.skipped == [
        Skip(1, "no user turn"),
        Skip(2, "no assistant turn"),
        Skip(3, "empty response"),
        Skip(4, "empty prompt"),
        Skip(5, "a turn with role 'tool'"),
        Skip(6, "the last response does not follow a user turn"),
        Skip(7, "empty messages"),
        Skip(8, "no user turn"),
    ]
    lines = found.summary().splitlines()
    assert lines[0] == "9 rows: 1 used, 8 skipped"
    assert "  no user turn: 2 (rows 1, 8)" in lines


def test_summary_says_when_row_numbers_are_left_out():
    found = Examples([], [Skip(row, "empty response") for row in range(12)])
    assert found.summary(limit=3).splitlines()[1] == "  empty response: 12 (rows 0, 1, 2, ...)"


def test_a_source_with_no_usable_row_is_refused(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"prompt": "q", "response": ""}] * 3)
    with pytest.raises(UserError, match=r"a\.jsonl: no row can be used: empty response \(3 rows\)$"):
        load_examples(source)
    with pytest.raises(UserError, match="there are no rows"):
        load_examples(write_lines(tmp_path / "b.jsonl", []))


# ---- files and rows that are wrong, named


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "q", ', r"a\.jsonl:4: not valid JSON"),
        ('["q", "a"]', r"a\.jsonl:4: a row must be an object with named fields, not list"),
        ('{"prompt": "q"}', r"a\.jsonl:4: no field among response, .*this row has: prompt"),
        ('{"prompt": "q", "response": 4}', r"a\.jsonl:4: field 'response' must be text, not int"),
        ('{"prompt": ["q"], "response": "a"}', r"a\.jsonl:4: field 'prompt' must be text, not list"),
        ('{"prompt": "\xff", "response": "a"}', r"a\.jsonl:4: not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    good = '{"prompt": "q", "response": "a"}\n'
    path.write_bytes(
        (good + "\n" + good + line + "\n").encode("latin-1")
    )  # the blank line counts as a line, not as a row
    with pytest.raises(UserError, match=message) as error:
        load_examples(str(path))
    assert "\n" not in str(error.value)


def test_all_malformed_rows_are_named_at_once(tmp_path):
    good, bad = {"prompt": "q", "response": "a"}, {"prompt": 5, "response": "a"}
    rows = [good, bad, "{", good, {"prompt": "q"}, bad, [1], {"prompt": " ", "response": "a"}, good]
    with pytest.raises(UserError) as refused:
        load_examples(write_lines(tmp_path / "a.jsonl", rows))
    path = tmp_path / "a.jsonl"
    broken, lacking, no_object, *others = str(refused.value).split("; ")[1:]
    assert str(refused.value).startswith(f"{path}:2, 6: field 'prompt' must be text, not int; ") and not others
    assert broken.startswith(f"{path}:3: not valid JSON: Expecting property name")
    assert lacking == f"{path}:5: no field among response, completion, answer, output (this row has: prompt)"
    assert no_object == f"{path}:7: a row must be an object with named fields, not list"


def test_of_many_malformed_rows_twenty_are_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": 5, "response": "a"}] * 1000))
    with pytest.raises(UserError) as refused:
        load_examples(str(tmp_path / "a.json"))
    rows, what = ", ".join(map(str, range(20))), "field 'prompt' must be text, not int"
    assert str(refused.value) == f"{tmp_path}/a.json row {rows}: {what}; and 980 more rows"


@pytest.mark.parametrize(
    "messages, message",
    [
        ("q", "messages must be a list of turns"),
        (["q"], "messages must be a list of turns"),
        ([{"content": "q"}], r"messages\[0\]: no field 'role' \(this row has: content\)"),
        ([CHAT[1], {"role": "assistant", "content": ["a"]}], r"messages\[1\]: field 'content' must be text, not list"),
    ],
)
def test_a_malformed_conversation_is_named(tmp_path, messages, message):
    rows = [{"messages": CHAT}, {"messages": messages}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"a\.json row 1: " + message):
        load_examples(str(tmp_path / "a.json"))


def test_unknown_columns_are_named_with_the_accepted_ones(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl:1: columns text, label fit no known layout; accepted: real"):
        load_examples(write_lines(tmp_path / "a.jsonl", [{"text": "x", "label": 1}]))


def test_json_that_is_no_list(tmp_path):
    (tmp_path / "a.json").write_text('{"prompt": "q", "response": "a"}')
    with pytest.raises(UserError, match=r"a\.json: must hold a list of rows, not dict"):
        load_examples(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('{"prompt": "q"}\n{"prompt": "q"}')
    with pytest.raises(UserError, match=r"one object a line\? then name it \.jsonl"):
        load_examples(str(tmp_path / "a.json"))


@pytest.mark.parametrize("option", [{"layout": "chatml"}, {"turn": "middle"}])
def test_unknown_options_name_the_choices(option):
    with pytest.raises(UserError, match="unknown .*: write "):
        load_examples("a.jsonl", **option)


# ---- kinds of source


def test_every_kind_of_file_gives_the_same_examples(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": CHAT}, {"messages": CHAT[1:3]}]
    data = datasets.Dataset.from_list(rows)
    write_lines(tmp_path / "a.jsonl", rows)
    write_lines(tmp_path / "a.ndjson", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train_sft": data}).save_to_disk(tmp_path / "splits")
    expected = load_examples(str(tmp_path / "a.jsonl"))
    assert [example.response for example in expected.examples] == ["7", "4"]
    for name in ("a.ndjson", "a.json", "a.parquet", "saved"):
        assert load_examples(str(tmp_path / name)) == expected, name
    assert load_examples(str(tmp_path / "splits"), split="train_sft") == expected
    with pytest.raises(UserError, match=r"splits: no split 'train'; there are: train_sft"):
        load_examples(str(tmp_path / "splits"))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./no/where", "nowhere", "gone/away.parquet"])
def test_a_missing_file_is_not_sought_on_the_hub(source):
    with pytest.raises(UserError, match=f"{source}: no such file or directory"):
        load_examples(source)


def test_a_file_of_unknown_kind(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response\n")
    with pytest.raises(UserError, match=r"a\.csv: cannot tell what this file is; name it \.jsonl"):
        load_examples(str(tmp_path / "a.csv"))


def test_a_hub_without_a_name_is_refused():
    with pytest.raises(UserError, match="hub:: names no data set; write hub:org/name"):
        load_examples("hub:")


@pytest.mark.parametrize("source", ["some-org/some-data", "hub:some-data", "some-org/some-data:main"])
def test_the_hub_out_of_reach_says_what_to_do(source):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="the Hub gave no split 'train': .*give its local path") as error:
        load_examples(source)
    assert "\n" not in str(error.value)


def test_a_hub_data_set_by_id(tmp_path, monkeypatch):
    """`datasets` resolves a relative directory like an id, so the same call runs without the Hub."""
    pytest.importorskip("datasets")
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_lines(tmp_path / "org" / "name" / "train.jsonl", [{"prompt": "q", "response": "a"}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert load_examples("hub:org/name").examples == [Example(0, (user("q"),), "a")]
    with pytest.raises(UserError, match="^org/name: the Hub gave no split 'dev': .*train"):  # and names those there are
        load_examples("hub:org/name", split="dev")


def test_tfds_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'spin_jax\[tfds\]'"):
        load_examples("tfds:gsm8k")


def test_tfds(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra [tfds]")

    class SpinJaxChat(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            turns = tfds.features.Sequence({"role": text, "content": text})
            features = tfds.features.FeaturesDict({"messages": turns, "number": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"messages": CHAT, "number": 1}

    SpinJaxChat(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(tmp_path)
    assert load_examples("tfds:spin_jax_chat").examples == [Example(0, tuple(CHAT[:4]), "7")]
    for source, message in (("spin_jax_chat", "Unknown split 'dev'"), ("spin_jax_nothing", "not found")):
        with pytest.raises(UserError, match=f"tfds:{source}: cannot load split 'dev': .*{message}") as error:
            load_examples(f"tfds:{source}", split="dev")
        assert len(str(error.value)) < 200


# ---- splits


def test_held_out_rows_never_train():
    examples = [Example(row, (user(str(row)),), "a") for row in range(100)]
    train, held_out = split_examples(examples, 10, seed=3)
    assert len(train) == 90 and len(held_out) == 10
    assert sorted(example.row for example in train + held_out) == list(range(100))
    assert [example.row for example in train] == sorted(example.row for example in train)
    assert split_examples(examples, 10, seed=3) == (train, held_out)
    assert split_examples(examples, 10, seed=4)[1] != held_out
    assert split_examples(examples, 0, seed=3) == (examples, [])


def test_a_smaller_training_set_is_part_of_a_larger_with_the_same_held_out_rows():
    examples = [Example(row, (user(str(row)),), "a") for row in range(100)]
    few, held_out = split_examples(examples, 10, seed=3, train_rows=20)
    more, same_held_out = split_examples(examples, 10, seed=3, train_rows=50)
    assert (len(few), len(more)) == (20, 50)
    assert held_out == same_held_out
    rows = {example.row for example in few}
    assert rows < {example.row for example in more} and max(rows) > 50  # drawn at random, not from the top


def test_rows_that_are_passed_over_leave_the_others_in_their_order():
    examples = [Example(row, (user(str(row)),), "a") for row in range(100)]

    def rows(without=()):
        parts = split_examples(examples, 10, seed=3, train_rows=20, without=without)
        return [[example.row for example in part] for part in parts]

    train, held_out = rows()
    gone = {held_out[0], *train[:2]}
    fewer_train, fewer_held_out = rows(gone)
    assert (len(fewer_train), len(fewer_held_out)) == (20, 10)
    assert set(held_out) - gone < set(fewer_held_out) and not gone & {*fewer_train, *fewer_held_out}
    assert set(train) - gone < {*fewer_train, *fewer_held_out}


def test_more_held_out_rows_than_there_are():
    with pytest.raises(UserError, match="cannot hold out 2 of 2 examples"):
        split_examples([Example(0, (user("q"),), "a"), Example(1, (user("q"),), "a")], 2, seed=0)


# ---- real data


@pytest.mark.parametrize(
    "source, split, rows",
    [
        ("gsm8k", "train", 7473),
        ("gsm8k", "test", 1319),
        ("gpteacher/roleplay.json", "train", 1923),
        ("gpteacher/codegen.json", "train", 4535),
        ("dolly_hhrlhf_small", "train", 1000),
        ("llama_factory_demo/alpaca_en_demo.json", "train", 999),
        ("rasbt_instruction", "train", 1100),
        ("fastchat_dummy", "train", 500),
    ],
)
def test_real_data(assets, source, split, rows):
    found = load_examples(str(assets / "data" / source), split=split)
    assert len(found.examples) + len(found.skipped) == rows
    assert all(example.prompt[-1]["role"] == "user" for example in found.examples)
    if source == "fastchat_dummy":
        assert any(len(example.prompt) > 1 for example in found.examples)


def test_real_preferences_train_no_earlier_turn(assets):
    with pytest.raises(UserError, match="no row can be used: no assistant turn .* are not read") as refused:
        load_examples(str(assets / "data" / "llama_factory_demo" / "dpo_en_demo.json"))
    assert "the last turn is the user's, without a response (chosen and rejected are not read) (106 rows)" in str(
        refused.value
    )
