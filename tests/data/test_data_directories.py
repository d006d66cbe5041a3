"""Which files of a directory are read as a split: all of its rows once, and nothing else that lies there."""

import json
import pathlib

import pytest
from data_rows import user, write_lines, write_parquet

from spin_jax.data.sources import Example, load_examples
from spin_jax.errors import UserError


def write_tree(directory: pathlib.Path, *names: str, **others: str) -> str:
    """Files with a row each, whose prompt is the file's name; `others` are text, by their names."""
    for name in names:
        path, row = directory / name, {"prompt": name, "response": "a"}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            write_parquet(path, [row])
        else:
            path.write_text(json.dumps([row] if path.suffix == ".json" else row))
    for name, text in others.items():
        (directory / name).write_text(text)
    return str(directory)


def read_names(source: str, split: str = "train") -> list[str]:
    """The files whose rows were read, in order."""
    examples = load_examples(source, split=split).examples
    assert [example.row for example in examples] == list(range(len(examples)))  # numbered through all the files
    return [example.prompt[0]["content"] for example in examples]


@pytest.mark.parametrize(
    "names, split, rows",
    [
        (["train", "test"], "test", ["test"]),
        (["train_small"], "train", ["train_small"]),
        (["train-00000-of-00002", "train-00001-of-00002"], "train", ["train-00000-of-00002", "train-00001-of-00002"]),
        (["train_sft-00000-of-00001", "train_gen-00000-of-00001"], "train_sft", ["train_sft-00000-of-00001"]),
        (["train", "train_extra"], "train", ["train"]),
        (["train", "train_1000"], "train", ["train"]),
        (["train_0", "train_1", "val_0"], "train", ["train_0", "train_1"]),
        (["part-0", "part-1"], "train", ["part-0", "part-1"]),
        (["alpaca_train", "alpaca_test"], "train", ["alpaca_train"]),
        (["alpaca.train", "alpaca.eval"], "test", ["alpaca.eval"]),
        (["training", "dev"], "train", ["training"]),
        (["Train", "Test"], "train", ["Train"]),
        (["training", "dev"], "validation", ["dev"]),
        (["latest", "constraints"], "train", ["constraints", "latest"]),  # no split is named in these
    ],
)
@pytest.mark.parametrize("folder", [".", "data"])
def test_a_directory_is_read_by_split(tmp_path, names, split, rows, folder):
    source = write_tree(tmp_path, *(f"{folder}/{name}.jsonl" for name in names))
    assert read_names(source, split) == [f"{folder}/{name}.jsonl" for name in rows]


@pytest.mark.parametrize(
    "names, split, rows",
    [
        (["train/b.jsonl", "train/a.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["train/a.jsonl", "test/a.jsonl"], "test", ["test/a.jsonl"]),
        (["data/train/0000.parquet", "data/train/0001.parquet", "data/test/0000.parquet"], "train", None),
        (["train.parquet/part.0.parquet", "train.parquet/part.1.parquet"], "train", None),
        (["README.jsonl", "test/a.jsonl", "train/a.jsonl"], "train", ["train/a.jsonl"]),
    ],
)
def test_folders_of_splits(tmp_path, names, split, rows):
    expected = rows or [name for name in names if "train" in name]
    assert read_names(write_tree(tmp_path, *names), split) == expected


def test_the_hubs_own_layout(tmp_path):
    train = [f"data/train-0000{shard}-of-00003-6ef3991c06080e14.parquet" for shard in range(3)]
    source = write_tree(
        tmp_path,
        *train,
        "data/test-00000-of-00001.parquet",
        **{"README.md": "---\nlicense: mit\n---", ".gitattributes": "*.parquet lfs", "dataset_infos.json": "{}"},
    )
    assert read_names(source) == train
    assert read_names(source, "test") == ["data/test-00000-of-00001.parquet"]


def test_what_else_lies_in_a_directory_is_no_data(tmp_path):
    source = write_tree(
        tmp_path,
        "a.jsonl",
        "b.json",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        ".hidden.jsonl",
        "_temporary/part-0.jsonl",
        "a_backup.jsonl",
        "a (1).jsonl",
        "b - Copy.json",
        "a.bak.jsonl",
        "sub/a.jsonl",
        **dict.fromkeys(("_SUCCESS", "README.md", "a.jsonl~", "a.jsonl.bak", "cache-1f.arrow", "a.jsonl.lock"), "text"),
        **dict.fromkeys(("metadata.json", "stats.json", "state.json", "dataset_info.json", "dataset_infos.json"), "{}"),
        **{"metadata.jsonl": '{"file_name": "a.png"}', "labels.json": '["yes", "no"]'},
    )
    assert read_names(source) == ["a.jsonl", "b.json"]


def test_a_name_like_a_backups_is_data_where_there_is_no_original(tmp_path):
    assert read_names(write_tree(tmp_path, "wiki_old.jsonl", "wiki_new.jsonl")) == ["wiki_new.jsonl", "wiki_old.jsonl"]


@pytest.mark.parametrize(
    "names, split, message",
    [
        (["test.jsonl"], "train", "files there: test.jsonl; --config.data.split takes test"),
        (["train_sft.jsonl", "train_gen.jsonl"], "train", "--config.data.split takes train_gen or train_sft"),
        (["a_train.jsonl", "b_train.jsonl"], "train", "--config.data.split takes a_train or b_train"),
        (["part-0.jsonl"], "test", "files there: part-0.jsonl; "),
        (["main/train.parquet", "socratic/train.parquet"], "train", "folders there: main, socratic: name one, as"),
        (["default/train/0000.parquet"], "train", "files there: none; folders there: default: name one, as"),
        (["train.jsonl.gz"], "train", "files there: train.jsonl.gz"),
        ([], "train", "files there: none"),
    ],
)
def test_a_directory_without_the_split_says_what_is_there(tmp_path, names, split, message):
    with pytest.raises(UserError, match=f"no .* file of split '{split}'; .*{message}"):
        load_examples(write_tree(tmp_path, *names), split=split)


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "train.parquet"],
        ["a.jsonl", "a.json"],
        ["train.jsonl", "data/train-00000-of-00001.parquet"],
        ["train.jsonl", "train/part-0.jsonl"],
        ["train-00000-of-00001-ab.parquet", "train-00000-of-00001-cd.parquet"],
        ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    ],
)
def test_rows_that_are_there_twice_are_refused(tmp_path, names):
    with pytest.raises(UserError, match=r"split 'train' is there more than once \(.*\): name the one to read"):
        load_examples(write_tree(tmp_path, *names))


def test_missing_shards_are_warned_of(tmp_path, caplog):
    source = write_tree(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    assert len(read_names(source)) == 2
    assert "only 2 of the 3 shards of train are there" in caplog.text


def test_a_json_file_that_is_no_list_says_so(tmp_path):
    with pytest.raises(UserError, match=r"rows\.json: must hold a list of rows, not dict"):
        load_examples(write_tree(tmp_path, **{"rows.json": '{"data": []}'}))


# ---- what `datasets` saves


def test_saved_data_sets_and_what_is_beside_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "q", "response": "a"}])
    expected = [Example(0, (user("q"),), "a")]
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "cache-1f.arrow").write_text("no")
    write_lines(tmp_path / "saved" / "notes.jsonl", [{"text": "x"}])
    assert load_examples(str(tmp_path / "saved")).examples == expected
    splits = tmp_path / "splits"
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(splits)
    next((splits / "test").glob("*.arrow")).unlink()  # of another split
    assert load_examples(str(splits)).examples == expected
    with pytest.raises(UserError, match=r"splits: no split 'dev'; there are: train, test"):
        load_examples(str(splits), split="dev")
    (splits / "dataset_dict.json").unlink()
    assert load_examples(str(splits)).examples == expected


def test_columns_of_images_are_not_decoded_and_json_columns_are(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = {"messages": datasets.List(datasets.Json()), "images": datasets.List(datasets.Image())}
    turns = [user("q"), {"role": "assistant", "content": "a", "tool_calls": []}]
    data = {"messages": [turns, turns], "images": [[], [{"bytes": b"no image at all", "path": None}]]}
    datasets.Dataset.from_dict(data, features=datasets.Features(features)).save_to_disk(tmp_path / "saved")
    found = load_examples(str(tmp_path / "saved"))
    assert found.examples == [Example(0, (user("q"),), "a")]
    assert [skip.reason for skip in found.skipped] == ["a row with images"]
