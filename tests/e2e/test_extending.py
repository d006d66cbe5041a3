"""docs/extending.md: each of its files is about 20 lines, and does what the page says, alone and in a run."""

import functools
import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import tiny_files
from documents import files
from processes import free_port, run_together

from spin_jax.data.sources import load_examples, load_prompts
from spin_jax.devices.sharding import one_device_mesh
from spin_jax.models.attention import causal_attention
from spin_jax.runtime.metric_writer import read_metrics

FILES = files(pathlib.Path(__file__).parents[2] / "docs/extending.md")
CHANGES = tiny_files.SETTINGS | {"iterations": 1}


@pytest.fixture
def shown(tmp_path, tiny_model, own_registries, monkeypatch) -> pathlib.Path:
    """A directory with the files of the page, and the model and the data that they speak of."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    (tmp_path / "my-sft-model").symlink_to(tiny_model)
    rows = [{"dialogue": f"Q: {row['prompt']}\nA: {row['response']}"} for row in tiny_files.make_rows()]
    tiny_files.write_jsonl(tmp_path / "my-dialogues.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_config")
    return tmp_path


@pytest.mark.parametrize("name", sorted(set(FILES) - {"my_config.py"}))
def test_a_file_is_about_20_lines_of_code(name):
    lines = [line for line in FILES[name].splitlines() if line.strip() and not line.startswith(("#", "import", "from"))]
    assert 5 <= len(lines) <= 20


def test_reading_the_config_imports_none_of_them(shown):
    importlib.import_module("my_config").get_config()
    assert not {name.removesuffix(".py") for name in FILES} - {"my_config"} & set(sys.modules)


def test_the_layout_reads_rows(shown):
    rows = [
        {"dialogue": "Q: 1+1?\nA: 2\nQ: 2+2?\nA: 4", "prompt": "p", "response": "r"},  # it is asked before the others
        {"dialogue": "B: who?"},
        {"prompt": "p", "response": "r"},
    ]
    source = str(tiny_files.write_jsonl(shown / "mixed.jsonl", rows))
    found = load_examples(source)
    assert [(len(example.prompt), example.response) for example in found.examples] == [(3, "4"), (1, "r")]
    assert [skip.reason for skip in found.skipped] == ["a line that begins with 'B'"]
    (prompt,) = load_prompts(str(tiny_files.write_jsonl(shown / "asked.jsonl", [{"dialogue": "Q: 2+2?"}])))
    assert prompt == [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_the_kernel_is_plain_attention(shown, sliding_window):
    """Value and gradients, of rows that hold two sequences each."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (2, 24, n, 8)) for key, n in zip(keys, (4, 2, 2, 4), strict=True))
    ends = np.repeat(np.array([[10, 24], [17, 24]], np.int32), 12, axis=1)
    ends[0, 10:12] = 24
    ends[1, 12:17] = 17
    starts = np.where(np.arange(24) < ends[:, :1], 0, ends[:, :1])
    positions = (np.arange(24) - starts).astype(np.int32)

    def value_and_gradients(kernel):
        attend = functools.partial(causal_attention, kernel=kernel, mesh=one_device_mesh() if kernel else None)
        value, pullback = jax.vjp(lambda *qkv: attend(*qkv, ends, positions, sliding_window), q, k, v)
        return value, *pullback(cotangent)

    by_head = jax.jit(value_and_gradients, static_argnums=0)("by_head")
    for found, expected in zip(by_head, value_and_gradients(None), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_all_of_them_in_a_run_that_two_processes_begin_and_one_goes_on_with(shown):
    """Every process executes the config file, at every start."""
    given = ("data.eval_rows", "evaluate.evaluators")  # by the page's own config file
    flags = [f"--config.{name}={value}" for name, value in CHANGES.items() if name not in given]
    command = ["-m", "spin_jax.main", "--config=my_config.py", "--workdir=runs/mine", *flags]
    several = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    both = [[*command, "--stages=generate,score", *several, f"--process_id={i}"] for i in range(2)]
    for ended in run_together(both, devices=1, directories=[shown] * 2):
        assert ended.status == 0, ended.output
    run = shown / "runs" / "mine"
    assert (run / "iteration_0" / "scores").exists() and not (run / "iteration_0" / "model").exists()
    (ended,) = run_together([command], devices=2, directories=[shown])
    assert ended.status == 0, ended.output

    assert "attention by_head" in ended.output  # the kernel
    assert "24 rows: 24 used" in ended.output and "columns not used" not in ended.output  # the layout
    first, *_ = read_metrics(run / "iteration_0" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(2, abs=1e-5) and "rewards/margin" not in first  # the objective
    results = [json.loads((run / part / "result.json").read_text()) for part in ("", "iteration_0")]
    accuracies = {row["model"]: row["choices/accuracy"] for row in results}  # the evaluator
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values()) and "held_out/nats_per_token" in results[0]
    best = json.loads((run / "best.json").read_text())  # the report
    assert accuracies[best["model"]] == best["accuracy"] == max(accuracies.values())
