"""What rows of many layouts are read as: the very prompt and response, and what is left out of them."""

import pytest
from data_rows import CHAT, assistant, read, system, user, write_lines, write_parquet

from spin_jax.data.layouts.turns import ROLES
from spin_jax.data.sources import Example, as_messages, encodable, load_examples, load_prompts, read_prompts
from spin_jax.errors import UserError


def skipped(directory, rows: list, **options) -> list[str]:
    """Why each row is left out, with a good one before them."""
    good = {"prompt": "q", "response": "a"}
    return [skip.reason for skip in load_examples(write_lines(directory / "a.jsonl", [good, *rows]), **options).skipped]


# ---- columns


@pytest.mark.parametrize("shape", ["messages", "conversations", "conversation"])
def test_last_and_first_turn_of_a_conversation(tmp_path, shape):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = CHAT if shape == "messages" else [{"from": names[t["role"]], "value": t["content"]} for t in CHAT]
    assert read(tmp_path, [{shape: turns, "id": 7}]) == [Example(0, tuple(CHAT[:4]), "7")]
    assert read(tmp_path, [{shape: turns, "id": 7}], turn="first") == [Example(0, tuple(CHAT[:2]), "4")]


Q, SQ, QC = (user("q"),), (system("S"), user("q")), (user("q\n\nc"),)


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"question": "q", "answer": "a"}, Q),  # GSM8K
        ({"prompt": "q", "completion": "a"}, Q),
        ({"instruction": "q", "output": "a"}, Q),
        ({"instruction": "q", "input": " ", "output": "a"}, Q),
        ({"instruction": "", "input": "q", "output": "a"}, Q),
        ({"instruction": "q", "input": "c", "response": "a"}, QC),
        ({"instruction": "q", "input": "c", "answer": "a"}, QC),
        ({"instruction": "q", "context": "c", "response": "a"}, QC),  # Dolly
        ({"question": "q", "context": "c", "answer": "a"}, QC),
        ({"instruction": "q", "input": "c", "context": "d", "output": "a"}, (user("q\n\nc\n\nd"),)),
        ({"system_prompt": "S", "question": "q", "response": "a"}, SQ),  # OpenOrca
        ({"system": "S", "instruction": "q", "output": "a"}, SQ),
        ({"system": " ", "prompt": "q", "response": "a"}, Q),
        ({"system": "S", "messages": [*Q, assistant("a")]}, SQ),
        ({"system": "S", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, SQ),
        ({"system": "T", "messages": [*SQ, assistant("a")]}, SQ),  # the conversation's own wins
        ({"system": "S", "messages": [system(""), *Q, assistant("a")]}, SQ),
        ({"messages": [{"role": "developer", "content": "S"}, *Q, assistant("a")]}, SQ),
        ({"conversations": ["q", "a"]}, Q),  # LIMA
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, Q),  # a sequence of TFDS
        ({"history": [], "instruction": "q", "output": "a"}, Q),
        (
            {"history": [["1", "2"], ["3", "4"]], "system": "S", "instruction": "q", "input": "c", "output": "a"},
            (system("S"), user("1"), assistant("2"), user("3"), assistant("4"), *QC),
        ),
    ],
)
def test_every_column_that_changes_the_prompt_is_in_it(tmp_path, row, prompt):
    assert read(tmp_path, [row]) == [Example(0, prompt, "a")]


def test_a_system_text_is_before_both_responses_of_a_pair(tmp_path):
    row = {"system": "S", "real": [*Q, assistant("a")], "generated": [*Q, assistant("b")]}
    assert read(tmp_path, [row]) == [Example(0, SQ, "a", generated="b")]


def test_the_first_exchange_of_an_alpaca_row_with_a_history(tmp_path):
    row = {"history": [["1", "2"]], "system": "S", "instruction": "q", "output": "a"}
    assert read(tmp_path, [row], turn="first") == [Example(0, (system("S"), user("1")), "2")]
    path = write_lines(tmp_path / "a.jsonl", [row, {"history": None, "instruction": "q"}])
    assert load_prompts(path) == [[system("S"), user("1"), assistant("2"), user("q")], "q"]


def test_what_is_not_used_is_named_once(tmp_path):
    rows = [
        {"id": 1, "messages": [*Q, {**assistant("a"), "weight": 1}], "note": None},
        {"id": 2, "messages": [*Q, {**assistant("a"), "reasoning_content": "hm"}], "source": "web", "tools": []},
        {"system": "T", "messages": [*SQ, assistant("a")]},
    ]
    found = load_examples(write_lines(tmp_path / "a.jsonl", rows))
    assert found.unused == ["id", "messages[].weight", "source", "messages[].reasoning_content", "system"]
    last = "  columns not used: id, messages[].weight, source, messages[].reasoning_content, system"
    assert found.summary().splitlines() == ["3 rows: 3 used, 0 skipped", last]


def test_messages_win_over_other_columns_and_a_named_layout_wins_over_both(tmp_path):
    row = {"prompt": "p", "response": "r", "messages": CHAT}
    assert read(tmp_path, [row]) == [Example(0, tuple(CHAT[:4]), "7")]
    assert read(tmp_path, [row], layout="prompt_response") == [Example(0, (user("p"),), "r")]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "q", "context": {"a": 1}, "response": "a"}, "field 'context' must be text, not dict"),
        ({"prompt": "q", "system": ["S"], "response": "a"}, "field 'system' must be text, not list"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, r"history must be a list of \[question, answer\]"),
        ({"instruction": "q", "output": ["a", "b"]}, "field 'output' must be text, not list"),
    ],
)
def test_a_column_of_the_prompt_of_another_kind_stops_the_run(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {message}"):
        read(tmp_path, [row])


# ---- null is absent, row by row


def test_mixed_layouts_are_read_row_by_row(tmp_path):
    """As Parquet and joined data sets have them: each row has all columns, most of them null."""
    rows = [
        {"messages": [*Q, assistant("1")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "2"}]},
        {"prompt": "q", "response": "3"},
        {"instruction": "q", "input": "c", "output": "4"},
        {"question": "q", "answer": "5", "system": "S"},
        {"real": [*Q, assistant("6")], "generated": [*Q, assistant("7")]},
    ]
    expected = [
        Example(0, Q, "1"),
        Example(1, Q, "2"),
        Example(2, Q, "3"),
        Example(3, QC, "4"),
        Example(4, SQ, "5"),
        Example(5, Q, "6", generated="7"),
    ]
    assert load_examples(write_parquet(tmp_path / "a.parquet", rows)).examples == expected
    assert read(tmp_path, rows) == expected
    columns = {column for row in rows for column in row}
    assert read(tmp_path, [dict.fromkeys(columns) | row for row in rows]) == expected
    assert read(tmp_path, [dict.fromkeys(columns, []) | row for row in rows]) == expected


def test_keys_of_turns_that_are_null_are_absent(tmp_path):
    """A Parquet column of both kinds of turns: one has role and content, the other from and value."""
    nothing = dict.fromkeys(("role", "content", "from", "value", "tool_calls", "weight"))
    some = [nothing | user("q"), nothing | assistant("a")]
    others = [nothing | {"from": "human", "value": "q"}, nothing | {"from": "gpt", "value": "b"}]
    both = [{**turn, "from": "function", "value": "x"} for turn in some]  # role and content come first
    rows = [{"messages": turns} for turns in (some, others, both)]
    expected = [Example(0, Q, "a"), Example(1, Q, "b"), Example(2, Q, "a")]
    assert load_examples(write_parquet(tmp_path / "a.parquet", rows)).examples == expected
    assert read(tmp_path, rows) == expected


def test_rows_whose_columns_are_all_null_are_left_out(tmp_path):
    rows = [
        {"prompt": "q", "response": None},
        {"prompt": None, "response": "a"},
        {"messages": None},
        {"messages": []},
        {"conversations": None, "id": 1},
        {"real": [*Q, assistant("a")], "generated": None},
    ]
    assert skipped(tmp_path, rows) == [
        "empty response",
        "empty prompt",
        "empty messages",
        "empty messages",
        "empty conversations",
        "empty generated",
    ]


# ---- roles and contents


@pytest.mark.parametrize(
    "human, model",
    [("user", "assistant"), ("human", "gpt"), ("User", "Assistant"), ("prompter", "bot"), ("user", "model")],
)
def test_names_of_the_two_sides(tmp_path, human, model):
    turns = [{"role": human, "content": "q"}, {"role": model, "content": "a"}]
    assert read(tmp_path, [{"messages": turns}]) == [Example(0, Q, "a")]


def test_every_name_means_one_of_three_roles():
    assert set(ROLES.values()) == {"system", "user", "assistant"}
    assert {name for name, role in ROLES.items() if role == "assistant"} >= {"gpt", "chatgpt", "bard", "bing", "ai"}


@pytest.mark.parametrize("role", ["tool", "function", "function_call", "observation", "ipython", "narrator"])
def test_a_turn_of_a_tool_or_of_another_leaves_the_row_out(tmp_path, role):
    turns = [user("q"), {"role": role, "content": "x"}, assistant("a")]
    assert skipped(tmp_path, [{"messages": turns}]) == [f"a turn with role {role!r}"]
    assert skipped(tmp_path, [{"conversations": [{"from": role, "value": "x"}]}]) == [f"a turn with role {role!r}"]


def test_tools_and_media_are_left_out_and_counted_by_kind(tmp_path):
    messages = [*Q, assistant("a")]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    rows = [
        {"messages": messages, "tools": [{"name": "f"}]},
        {"messages": messages, "tools": '[{"name": "f"}]'},
        {"messages": messages, "images": ["a.png"]},
        {"prompt": "q", "response": "a", "image": {"bytes": "x", "path": None}},
        {"messages": [*Q, call, {"role": "tool", "content": "1"}, assistant("a")]},
        {"messages": [*Q, {**assistant(""), "function_call": {"name": "f"}}]},
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("a")]},
        {"messages": [user([{"type": "image", "text": None}, {"type": "text", "text": "q"}]), assistant("a")]},
    ]
    assert skipped(tmp_path, rows) == [
        "a row with tools",
        "a row with tools",
        "a row with images",
        "a row with image",
        "a turn with tool_calls",
        "a turn with function_call",
        "a turn with image_url content",
        "a turn with image content",
    ]
    path = write_lines(tmp_path / "b.jsonl", rows[:2])
    with pytest.raises(UserError, match=r"b\.jsonl:1, 2: a row with tools$"):  # no prompt is left out
        load_prompts(path)


def test_no_tools_are_no_tools(tmp_path):
    turn = {**assistant("a"), "tool_calls": [], "function_call": None, "images": None}
    for none in (None, [], "", "[]", "null", [None], {"bytes": None, "path": None}):
        row = {"messages": [*Q, turn], "tools": none, "images": none}
        assert read(tmp_path, [row]) == [Example(0, Q, "a")]


def test_contents_of_text_alone_are_joined(tmp_path):
    parts = [{"type": "text", "text": "2 + ", "image_url": None}, {"type": "text", "text": "2?"}]
    row = {"messages": [user(parts), assistant([{"type": "text", "text": "4"}])]}
    expected = [Example(0, (user("2 + 2?"),), "4")]
    assert read(tmp_path, [row]) == expected
    assert load_examples(write_parquet(tmp_path / "a.parquet", [row])).examples == expected


# ---- what has no response to learn


def test_a_conversation_that_ends_with_the_user_has_no_response(tmp_path):
    rows = [{"messages": CHAT[:4]}, {"messages": CHAT[:2]}, {"messages": [*CHAT, system("S")]}]
    assert skipped(tmp_path, rows) == [
        "the last turn is the user's, without a response",
        "no assistant turn",
        "the last turn is the system's, without a response",
    ]
    assert read(tmp_path, rows[:1], turn="first") == [Example(0, tuple(CHAT[:2]), "4")]  # as it was asked to


def test_answers_in_chosen_and_rejected_are_named_and_no_earlier_turn_is_trained(tmp_path):
    """LLaMA-Factory's layout of preferences."""
    answers = {"chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}}
    turns = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "2"}]
    rows = [{"conversations": turns, **answers}, {"conversations": turns[:1], **answers}]
    assert skipped(tmp_path, rows) == [
        "the last turn is the user's, without a response (chosen and rejected are not read)",
        "no assistant turn (chosen and rejected are not read)",
    ]
    with pytest.raises(UserError, match=r"no row can be used: .*\(chosen and rejected are not read\) \(1 rows\)"):
        read(tmp_path, rows[:1])
    for row in ({"prompt": "q"}, {"instruction": "q", "input": ""}, {}):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: .*: chosen and rejected are not read; to learn from both"):
            read(tmp_path, [row | answers])
    binarized = {"prompt": "q", "chosen": [*Q, assistant("a")], "rejected": [*Q, assistant("b")]}
    found = load_examples(write_lines(tmp_path / "a.jsonl", [{**binarized, "messages": [*Q, assistant("a")]}]))
    assert found.examples == [Example(0, Q, "a")] and found.unused == ["prompt", "chosen", "rejected"]
    assert load_prompts(write_lines(tmp_path / "b.jsonl", [binarized])) == ["q"]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [*Q, assistant("a")], "rejected": [*Q, assistant("b")]},
        {
            "prompt": "q",
            "chosen": [*Q, assistant("a")],
            "rejected": [*Q, assistant("b")],
            "messages": [*Q, assistant("c")],
        },
        {"prompt": list(Q), "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"question": "q", "chosen": "a", "rejected": "b"},
    ],
)
def test_preferences(tmp_path, row):
    """TRL's layouts: conversational and text, the prompt explicit and implicit; only where they are asked for."""
    expected = Example(0, Q, "a", "b")
    assert read(tmp_path, [row], layout="preference") == [expected]
    assert load_examples(write_parquet(tmp_path / "a.parquet", [row]), layout="preference").examples == [expected]
    with_system = {"system": "S", **row}
    assert read(tmp_path, [with_system], layout="preference") == [Example(0, (system("S"), *Q), "a", "b")]


def test_preferences_that_cannot_be_trained_on(tmp_path):
    rows = [
        {"chosen": [*Q, assistant("a")], "rejected": [user("other"), assistant("b")]},
        {"chosen": [*Q, assistant("a"), user("r")], "rejected": [*Q, assistant("b")]},
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": None},
    ]
    with pytest.raises(UserError, match="no row can be used") as refused:
        read(tmp_path, rows, layout="preference")
    for reason in ("answer different prompts", "the last turn is the user's", "empty response", "empty rejected"):
        assert reason in str(refused.value)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: no field among prompt"):
        read(tmp_path, [{"chosen": "a", "rejected": "b"}], layout="preference")


def test_a_response_marked_as_bad_is_left_out(tmp_path):
    """KTO's rows."""
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False, 0, "no")]
    assert [example.row for example in read(tmp_path, rows)] == [0, 2, 3]
    rows.append({"messages": [*Q, assistant("a")], "kto_tag": False})
    reasons = [f"a response marked as unwanted ({name} is false)" for name in ("label", "kto_tag")]
    assert skipped(tmp_path, rows) == reasons


def test_questions_and_answers_may_be_turns(tmp_path):
    """TRL's conversational rows, among plain ones."""
    turns = [system("s"), user("1+1?"), assistant("2"), user("q")]
    rows = [
        {"prompt": turns, "completion": [assistant("a")]},
        {"prompt": "q", "response": [assistant("a")], "system": "s"},
        {"instruction": Q, "input": "i", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": [*Q, assistant("a")]},
        {"prompt": [], "completion": "a"},
    ]
    assert read(tmp_path, rows) == [
        Example(0, tuple(turns), "a"),
        Example(1, (system("s"), *Q), "a"),
        Example(2, (user("q\n\ni"),), "a"),
        Example(3, Q, "a"),
    ]
    assert skipped(tmp_path, rows) == ["a response that holds other turns than the assistant's", "empty prompt"]
    assert load_prompts(write_lines(tmp_path / "a.jsonl", rows[:2])) == [turns, [system("s"), *Q]]


@pytest.mark.parametrize(
    "row, column, example",
    [
        ({"prompt": "q", "chosen": "a"}, "response", Example(0, Q, "a")),
        ({"prompt": [*Q], "chosen": [assistant("a")]}, "response", Example(0, Q, "a")),
        ({"prompt": "q", "chosen": [*Q, assistant("a")]}, "messages", Example(0, Q, "a")),
        ({"chosen": [*Q, assistant("a")]}, "messages", Example(0, Q, "a")),
    ],
)
def test_the_advice_on_preferences_can_be_followed(tmp_path, row, column, example):
    with pytest.raises(UserError, match=f"to learn from one of them, call it {column}$"):
        read(tmp_path, [row])
    assert read(tmp_path, [row | {column: row["chosen"], "chosen": None}]) == [example]


# ---- text that cannot be encoded


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain \U0001f600", "plain \U0001f600"),
        ("cut \ud83d", "cut \ufffd"),
        ("\ude00 and \ud83d here", "\ufffd and \ufffd here"),
        ("\ud83d\ude00 whole in halves", "\U0001f600 whole in halves"),
    ],
)
def test_half_a_character_becomes_the_replacement_character(text, expected):
    assert encodable(text) == expected
    assert encodable(expected) is expected


def test_halves_are_replaced_and_counted_wherever_text_is_read(tmp_path, caplog):
    caplog.set_level("INFO", "spin_jax")
    rows = [
        r'{"prompt": "a \ud83d", "response": "b"}',
        {"prompt": "whole \U0001f600", "response": "b"},
        r'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\ude00"}]}',
        r'{"system": "\ud83d", "instruction": "q", "output": "a", "history": [["\ud83d", "1"]]}',
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    found = load_examples(path)
    assert found.examples == [
        Example(0, (user("a \ufffd"),), "b"),
        Example(1, (user("whole \U0001f600"),), "b"),
        Example(2, Q, "\ufffd"),
        Example(3, (system("\ufffd"), user("\ufffd"), assistant("1"), user("q")), "a"),
    ]
    assert found.mended == [0, 2, 3]
    assert "replaced by U+FFFD: 3 (rows 0, 2, 3)" in found.summary()
    assert load_prompts(path)[:3] == ["a \ufffd", "whole \U0001f600", [user("q")]]
    assert "replaced by U+FFFD: 2 (rows 0, 3)" in caplog.text  # the answer of row 2 is not asked
    caplog.clear()
    assert read_prompts(["a", "b \ud83d", [user("c \ud83d")]]) == [[user(t)] for t in ("a", "b \ufffd", "c \ufffd")]
    assert "replaced by U+FFFD: 2 (rows 1, 2)" in caplog.text


def test_prompts_of_the_python_surface_are_read_as_data_is():
    turns = [{"from": "human", "value": [{"type": "text", "text": "q"}]}]
    assert as_messages(turns) == as_messages(tuple(turns)) == [user("q")] == as_messages("q")
    with pytest.raises(
        UserError, match=r"^prompt 1, 2: prompt must be a list of turns .*; prompt 3: prompt\[0\]: no f"
    ):
        read_prompts(["q", {"role": "user", "content": "q"}, 5, [{"content": "q"}]])
    with pytest.raises(UserError, match="a turn with role 'tool' cannot be asked"):
        as_messages([{"role": "tool", "content": "q"}])
