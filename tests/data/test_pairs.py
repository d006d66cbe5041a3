import dataclasses

import numpy as np
import pytest

from spin_jax.data.pairs import Pair, read_sampled, whole_sequence, write_pairs_parquet
from spin_jax.data.sources import Example, Skip, load_examples
from spin_jax.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def turns(question: str, answer: str) -> list[dict]:
    return [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]


def test_a_file_in_exactly_the_authors_shape(tmp_path):
    rows = [
        {"real": turns("a?", "yes"), "generated": turns("a?", "no")},
        {"real": turns("b?", "yes"), "generated": turns("c?", "no")},
        {"real": turns("d?", "yes"), "generated": turns("d?", "")},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    found = load_examples(str(tmp_path))
    assert found.examples == [
        Example(0, ({"role": "user", "content": "a?"},), "yes", generated="no"),
        # An opponent that stopped at once: nothing is wrong with the row.
        Example(2, ({"role": "user", "content": "d?"},), "yes", generated=""),
    ]
    assert found.skipped == [Skip(1, "real and generated answer different prompts")]


EXAMPLES = [
    Example(4, ({"role": "user", "content": "a?"},), "yes\n", generated=" no", truncated=True),
    Example(
        9,
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "b?"},
            {"role": "assistant", "content": "é"},
            {"role": "user", "content": "c?"},
        ),
        "ja",
        generated="",
    ),
]


def test_what_is_written_comes_back(tmp_path):
    path = tmp_path / "generated" / "train.parquet"
    write_pairs_parquet(path, EXAMPLES, {"score": [-1.5, 0.0]})
    expected = [dataclasses.replace(example, row=index) for index, example in enumerate(EXAMPLES)]
    assert load_examples(str(path)).examples == expected  # as a source of its own, with rows of its own
    assert load_examples(str(path.parent)).examples == expected
    assert parquet.read_table(path)["score"].to_pylist() == [-1.5, 0.0]
    assert [file.name for file in path.parent.iterdir()] == ["train.parquet"]  # no partial file is left


def test_sampled_ids_come_back_by_the_rows_of_the_data_set(tmp_path):
    sampled = [np.array([255, 7], np.int32), np.array([], np.int32)]  # ids that need not be any text's tokenisation
    write_pairs_parquet(tmp_path / "a.parquet", EXAMPLES, {"generated_tokens": sampled})
    found = read_sampled(tmp_path / "a.parquet")
    assert list(found) == [4, 9]
    for [(tokens, truncated)], expected, example in zip(found.values(), sampled, EXAMPLES, strict=True):
        np.testing.assert_array_equal(tokens, expected, strict=True)
        assert truncated is example.truncated


def test_responses_to_one_row_stay_together_in_their_order(tmp_path):
    sampled = [np.array(ids, np.int32) for ids in ([3], [1], [2], [4])]
    two_each = [example for example in EXAMPLES for _ in range(2)]
    write_pairs_parquet(tmp_path / "a.parquet", two_each, {"generated_tokens": sampled})
    found = read_sampled(tmp_path / "a.parquet")
    assert {row: [tokens.tolist() for tokens, _ in of_row] for row, of_row in found.items()} == {
        4: [[3], [1]],
        9: [[2], [4]],
    }


def test_what_is_written_has_the_authors_columns(tmp_path):
    write_pairs_parquet(tmp_path / "a.parquet", EXAMPLES[:1])
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.select(["real", "generated"]).to_pylist() == [
        {"real": turns("a?", "yes\n"), "generated": turns("a?", " no")}
    ]
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=tmp_path / "cache")[
        "train"
    ]
    assert data[0]["generated"] == turns("a?", " no")


def test_writing_again_replaces_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    write_pairs_parquet(path, EXAMPLES)
    write_pairs_parquet(path, EXAMPLES[:1])
    assert [example.response for example in load_examples(str(path)).examples] == ["yes\n"]


def test_a_real_side_that_is_empty_is_skipped_and_a_bad_column_is_named(tmp_path):
    write_pairs_parquet(tmp_path / "a.parquet", [*EXAMPLES, dataclasses.replace(EXAMPLES[0], response=" ")])
    assert load_examples(str(tmp_path / "a.parquet")).skipped == [Skip(2, "empty response")]
    table = pyarrow.table({"real": ["text"], "generated": ["text"]})
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet row 0: real must be a list of turns"):
        load_examples(str(tmp_path / "b.parquet"))


def test_a_whole_sequence_is_all_but_the_token_that_nothing_predicts():
    prompt, real, generated = (np.array(ids, np.int32) for ids in ([1, 2, 3], [4, 5], [6]))
    whole = whole_sequence(Pair(7, 0, prompt, (real, generated), (True, False)))
    assert whole.prompt.tolist() == [1] and [y.tolist() for y in whole.responses] == [[2, 3, 4, 5]]
    assert whole.truncated == (True,) and whole.row == 7
