import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import tiny_files

import spin_jax
from spin_jax import models
from spin_jax.data.pairs import read_sampled
from spin_jax.errors import UserError
from spin_jax.reports import timing
from spin_jax.reports.summary import read_summary
from spin_jax.runtime.metric_writer import read_metrics
from spin_jax.self_play import outlook
from spin_jax.self_play.algorithm import self_play
from spin_jax.self_play.run import open_run

LEARNED = {"loss", "rewards/real", "rewards/generated", "rewards/margin", "rewards/accuracy", "logps/real"}
LEARNED |= {"logps/generated", "grad_norm", "learning_rate"}
LEARNED |= {f"{name}/{y}" for name in ("logps_per_token", "entropy", "token_accuracy") for y in ("real", "generated")}
LEARNED |= {"kl/generated"}
COUNTED = {"lengths/real", "lengths/generated", "truncated/real", "truncated/generated", "fill"}
TIMED = {"seconds", "tokens_per_second", "model_tflops_per_second"}


def weights(model) -> bytes:
    return (model / "model.safetensors").read_bytes()


def read_scores(workdir, t, of="steps") -> dict[str, np.ndarray]:
    with np.load(workdir / f"iteration_{t}" / "scores" / f"{of}.npz") as file:
        return dict(file)


def rows_of_both_kinds(config, workdir) -> tuple[set[int], set[int]]:
    run = open_run(config, workdir)
    return {e.row for e in run.train_examples}, {e.row for e in run.held_out_examples}


def plain_logprob(model: spin_jax.Model, prompt: np.ndarray, response: np.ndarray) -> float:
    """log p(response | prompt) from the logits of every position of one row."""
    tokens = np.concatenate([prompt, response])
    padded_T = jnp.array(np.pad(tokens, (0, 64 - len(tokens))))
    logps_TV = np.asarray(all_logprobs(model.config, model.params, padded_T))
    return float(sum(logps_TV[len(prompt) - 1 + j, token] for j, token in enumerate(response)))


@functools.partial(jax.jit, static_argnums=0)
def all_logprobs(config: models.ModelConfig, params: dict, tokens_T: jax.Array) -> jax.Array:
    hidden_1TD, _ = models.forward(config, params, tokens_T[None])
    return jax.nn.log_softmax(models.unembed(config, params, hidden_1TD)[0])


def given_pairs(tiny_data) -> list[dict]:
    """The tiny data in the authors' layout, with a generated answer of a length that no model would keep to."""
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]

    def turns(row, answer):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]

    return [{"real": turns(row, row["response"]), "generated": turns(row, "zz")} for row in rows]


# ---- what a run leaves behind


def test_a_run_tells_what_it_is_about_to_do(finished):
    """On eight devices, 16 rows and 8 held out; the second iteration has the pairs of the first as well."""
    begins = next(i for i, line in enumerate(finished.told) if line.startswith("devices: "))
    told = finished.told[begins : begins + 5]
    assert told[0].startswith("devices: 8, processes: 1; training over fsdp 8; sampling over ")
    assert told[1] == "computes in float32; attention tiled (auto: the kernel for a cpu)"
    assert told[2].endswith("/model: 25,248 parameters, all of them trained; 16 rows to train on, 8 held out")
    assert told[3] == "iterations: 2, of 2, 4 steps of 8 pairs"
    assert told[4] == f"starts anew in {finished.workdir}"
    run = open_run(finished.config, finished.workdir)
    assert outlook._position(run) == f"goes on in {finished.workdir}: all iterations are trained"


def test_a_run_knows_the_loops_that_it_makes(finished):
    """And so how long it will take: in the second iteration, when each has been made once, and at its end nothing."""
    ended = [line for line in finished.told if ", took " in line]
    loops = outlook.loops(open_run(finished.config, finished.workdir))
    assert [line.split(" of ")[0].rpartition(":")[0] for line in ended] == [loop.name for loop in loops]
    assert all(line.endswith(" of the run left") for line in ended if line.startswith("iteration 1"))
    assert ended[-1].endswith(", 0 s of the run left")


@pytest.mark.parametrize(
    ("gone", "position"),
    [
        (("iteration_0", "iteration_1"), "starts anew in {}"),
        (("iteration_1/model", "iteration_1/scores", "iteration_1/generated"), "goes on in {}: iteration 1, generate"),
        (("iteration_1/model", "iteration_1/scores"), "goes on in {}: iteration 1, score"),
        (("iteration_1/model",), "goes on in {}: iteration 1, train"),
        (("iteration_1/model", "to step 3"), "goes on in {}: iteration 1, train, from step 3"),
    ],
)
def test_a_run_tells_what_it_goes_on_with(finished, tmp_path, gone, position):
    shutil.copytree(finished.workdir, tmp_path / "run")
    for path in gone:
        shutil.rmtree(tmp_path / "run" / path, ignore_errors=True)
    if "to step 3" in gone:
        (tmp_path / "run/iteration_1/checkpoints/3").mkdir(parents=True)
    assert outlook._position(open_run(finished.config, tmp_path / "run")) == position.format(tmp_path / "run")


def test_workdir_is_laid_out_as_documented(finished):
    for t in range(2):
        names = {path.name for path in (finished.workdir / f"iteration_{t}").iterdir()}
        assert names == {
            "generated",
            "scores",
            "metrics.jsonl",
            "tensorboard",
            "model",
            "result.json",
            "rewards.jsonl",
            "samples.jsonl",
        }
        assert [path.name for path in (finished.workdir / f"iteration_{t}" / "generated").iterdir()] == [
            "pairs.parquet"
        ]
        assert list((finished.workdir / f"iteration_{t}" / "tensorboard").glob("events.*"))
    assert (finished.workdir / "report.html").exists()
    assert not list(finished.workdir.rglob("*.partial"))


def test_summary_has_a_row_for_each_model(finished):
    assert [row["model"] for row in finished.rows] == ["SFT", "iteration 0", "iteration 1"]
    assert read_summary(finished.workdir) == finished.rows
    text = (finished.workdir / "summary.txt").read_text()
    assert all(row["model"] in text for row in finished.rows) and "nats_per_token" in text


def test_rewards_of_held_out_pairs_are_those_of_the_summary(finished):
    for t, result in enumerate(finished.rows[1:]):
        lines = (finished.workdir / f"iteration_{t}" / "rewards.jsonl").read_text().splitlines()
        pairs = list(map(json.loads, lines))
        train, held_out = rows_of_both_kinds(finished.config, finished.workdir)
        assert {pair["row"] for pair in pairs} == held_out
        for of in ("real", "generated"):
            assert np.mean([pair[f"rewards/{of}"] for pair in pairs]) == result[f"held_out/rewards/{of}"]
        assert (
            np.mean([pair["rewards/real"] > pair["rewards/generated"] for pair in pairs])
            == (result["held_out/rewards/accuracy"])
        )


def test_the_time_of_each_loop_is_noted(finished):
    """Loops of each stage, in no more time than the run has taken; what it computed with; steps by the metrics."""
    rows = [json.loads(line) for line in (finished.workdir / "timing.jsonl").read_text().splitlines()]
    assert {"started", "devices", "processes", "jax", "python"} < rows[0].keys()
    whole = timing.spent(rows)
    stages = {"generate", "score held-out pairs", "score", "train", "evaluate", "sample"}
    assert {(stage, t) for stage in stages for t in (0, 1)} | {("sample SFT", 0)} == whole.loops.keys()
    assert 0 < whole.useful < sum(whole.loops.values()) < whole.wall and whole.starts == 1
    for t in (0, 1):
        steps = sum(row["seconds"] for row in read_metrics(finished.workdir / f"iteration_{t}" / "metrics.jsonl"))
        assert 0 < steps <= whole.loops["train", t]


def test_answers_to_the_held_out_prompts_are_kept(finished):
    """theta_0 is the opponent of iteration 0; the policy of iteration 0 answers as the opponent of iteration 1 does."""
    start, first, second = (
        {
            row["row"]: row
            for row in map(json.loads, (finished.workdir / name / "samples.jsonl").read_text().splitlines())
        }
        for name in ("", "iteration_0", "iteration_1")
    )
    assert len(start) == tiny_files.EVAL_ROWS and all(row["policy"] == row["opponent"] for row in start.values())
    assert {row: kept["policy"] for row, kept in first.items()} == {
        row: kept["opponent"] for row, kept in second.items()
    }
    for row, summary in zip((start, first, second), finished.rows, strict=True):
        assert summary["samples/truncated"] == np.mean([kept["truncated"] for kept in row.values()])
    shown = [line for line in finished.told if "answers held-out prompts" in line]
    assert len(shown) == 3 and all(
        shown[0].count(who) >= tiny_files.EVAL_ROWS for who in ("real", "opponent", "policy")
    )


def test_metrics_have_every_field_once_a_step(finished):
    for t, steps in ((0, 2), (1, 4)):  # 16 pairs by 8; then as many again from the iteration before
        rows = read_metrics(finished.workdir / f"iteration_{t}" / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert all(set(row) == {"step"} | LEARNED | COUNTED | TIMED for row in rows)
        # The policy starts as its own opponent, whose scores are of the same program and rows.
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert rows[0]["rewards/real"] == rows[0]["rewards/generated"] == rows[0]["rewards/accuracy"] == 0
        assert rows[0]["kl/generated"] == 0 and 0 < rows[0]["entropy/real"] < np.log(104)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_held_out_rows_are_never_trained_on(finished):
    train, held_out = rows_of_both_kinds(finished.config, finished.workdir)
    assert len(train) == tiny_files.TRAIN_ROWS and len(held_out) == tiny_files.EVAL_ROWS and not train & held_out
    assert [set(rows) for rows in finished.trained_on] == [train, train]
    table = pyarrow.parquet.read_table(finished.workdir / "iteration_1" / "generated" / "pairs.parquet").to_pydict()
    assert {row for row, is_held_out in zip(table["row"], table["held_out"], strict=True) if is_held_out} == held_out


def test_every_step_uses_every_row_as_often(finished):
    for t, rows in enumerate(finished.trained_on):
        assert sorted(rows) == sorted([*set(rows)] * (t + 1))  # one epoch of one, then of two iterations' pairs


def test_the_exported_model_is_the_trained_one(finished):
    """result.json was measured with the params in memory; the files must hold the same."""
    run = open_run(finished.config, finished.workdir)
    model = spin_jax.load(finished.workdir / "iteration_1" / "model")
    sampled = read_sampled(finished.workdir / "iteration_1" / "generated" / "pairs.parquet")
    pairs = [run.pair(example, sampled[example.row][0], 1) for example in run.held_out_examples]
    real = [(pair.prompt, pair.responses[0]) for pair in pairs]
    nats = -sum(plain_logprob(model, *one) for one in real) / sum(len(response) for _, response in real)
    assert finished.rows[2]["held_out/nats_per_token"] == pytest.approx(nats, rel=1e-6)
    assert finished.rows[1]["held_out/nats_per_token"] != pytest.approx(nats, rel=1e-3)


def test_iteration_1_scores_new_and_old_pairs_under_its_own_opponent(finished):
    run = open_run(finished.config, finished.workdir)
    opponent = spin_jax.load(finished.workdir / "iteration_0" / "model")
    sampled = [read_sampled(finished.workdir / f"iteration_{t}" / "generated" / "pairs.parquet") for t in range(2)]
    assert any(list(sampled[0][row][0][0]) != list(sampled[1][row][0][0]) for row in sampled[0])  # drawn anew

    examples = {example.row: example for example in run.train_examples + run.held_out_examples}
    steps, held_out = read_scores(finished.workdir, 1), read_scores(finished.workdir, 1, "held_out")
    train = [example.row for example in run.train_examples]
    found = zip(steps["iterations"].flat, steps["rows"].flat, strict=True)
    assert sorted(found) == sorted((t, row) for t in (0, 1) for row in train)
    assert held_out["rows"].tolist() == [example.row for example in run.held_out_examples]
    assert set(held_out["iterations"].tolist()) == {1}
    for scores in (steps, held_out):
        found = zip(scores["iterations"].flat, scores["rows"].flat, scores["logps"].reshape(-1, 2), strict=True)
        for t, row, logps in list(found)[::5]:
            pair = run.pair(examples[row], sampled[t][row][0], t)
            live = [plain_logprob(opponent, pair.prompt, response) for response in pair.responses]
            np.testing.assert_allclose(logps, live, rtol=1e-5)

    def of_first_pairs(t: int) -> np.ndarray:
        """Scores in iteration t of the pairs of iteration 0, by row."""
        scores = read_scores(finished.workdir, t)
        chosen = scores["iterations"] == 0
        return scores["logps"][chosen][np.argsort(scores["rows"][chosen])]

    assert np.all(of_first_pairs(0) != of_first_pairs(1))  # under theta_0 and theta_1


def test_several_responses_to_a_prompt_make_several_pairs(tiny_model, tiny_data, tmp_path, finished):
    changes = {"iterations": 1, "generate.responses": 2}
    self_play(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "iteration_0" / "generated" / "pairs.parquet").to_pydict()
    alone = pyarrow.parquet.read_table(finished.workdir / "iteration_0" / "generated" / "pairs.parquet").to_pydict()
    assert table["row"][::2] == table["row"][1::2] == alone["row"]
    assert table["generated_tokens"][::2] == alone["generated_tokens"] != table["generated_tokens"][1::2]
    assert table["real"][::2] == table["real"][1::2]
    scores = read_scores(tmp_path, 0)
    order = np.argsort(scores["rows"].flatten(), kind="stable")
    rows, logps = scores["rows"].flatten()[order], scores["logps"].reshape(-1, 2)[order]
    assert len(rows) == 2 * tiny_files.TRAIN_ROWS and np.array_equal(rows[::2], rows[1::2])
    assert len(read_scores(tmp_path, 0, "held_out")["rows"]) == 2 * tiny_files.EVAL_ROWS
    np.testing.assert_allclose(logps[::2, 0], logps[1::2, 0], rtol=1e-6)  # of the real response, in other rows
    assert np.mean(logps[::2, 1] != logps[1::2, 1]) > 0.5  # of two drawn ones
    assert len(read_metrics(tmp_path / "iteration_0" / "metrics.jsonl")) == 4  # 32 pairs by 8


# ---- the same run in other ways


def test_a_second_call_makes_nothing_new(finished):
    def state():
        return {path: path.stat().st_mtime_ns for path in finished.workdir.glob("iteration_*/**/*")}

    before = state()
    assert self_play(finished.config, finished.workdir) == finished.rows
    assert state() == before


def test_stages_alone_end_in_the_same_weights(finished, tmp_path):
    for t in range(2):
        for stage in ("generate", "score", "train"):
            assert not (tmp_path / f"iteration_{t}" / "model").exists()
            self_play(finished.config, tmp_path, [stage])
        model = f"iteration_{t}/model"
        assert weights(tmp_path / model) == weights(finished.workdir / model)
    assert read_summary(tmp_path) == finished.rows


def test_a_stage_whose_input_is_missing_says_which_stage_to_run(finished, tmp_path):
    with pytest.raises(UserError, match=r"pairs.parquet is missing: run the generate stage of iteration 0 first"):
        self_play(finished.config, tmp_path, ["score"])
    shutil.copytree(finished.workdir / "iteration_0" / "generated", tmp_path / "iteration_0" / "generated")
    with pytest.raises(UserError, match=r"steps.npz is missing: run the score stage of iteration 0 first"):
        self_play(finished.config, tmp_path, ["train"])


def test_a_live_opponent_gives_the_losses_of_a_stored_one(finished, tiny_model, tiny_data, tmp_path):
    # Its scores are of all pairs; a live run keeps those of the held-out ones only, and makes them anew.
    shutil.copytree(finished.workdir / "iteration_0", tmp_path / "iteration_0", ignore=shutil.ignore_patterns("scores"))
    shutil.copytree(finished.workdir / "iteration_1" / "generated", tmp_path / "iteration_1" / "generated")
    self_play(tiny_files.make_config(tiny_model, tiny_data, {"spin.opponent": "live"}), tmp_path)
    scores = {path.name for path in (tmp_path / "iteration_1" / "scores").iterdir()}
    assert scores == {"held_out.npz"}  # nothing else is needed ahead
    stored, live = (read_metrics(w / "iteration_1" / "metrics.jsonl") for w in (finished.workdir, tmp_path))
    # While policy and opponent are the same, who is ahead is rounding: in the first step, and in the second, since the
    # first, at the start of the warm-up, changes nothing.
    assert all(abs(row["rewards/margin"]) < 1e-6 for rows in (stored, live) for row in rows[:2])
    for step, (a, b) in enumerate(zip(stored, live, strict=True)):
        compared = LEARNED - {"rewards/accuracy"} if step < 2 else LEARNED
        assert {name: a[name] for name in compared} == pytest.approx(
            {name: b[name] for name in compared}, rel=1e-4, abs=1e-6
        )


def test_scores_of_another_mesh_are_made_anew(tiny_model, tiny_data, tmp_path, caplog):
    """They would differ from the policy's log-probs by rounding."""
    changes = {"iterations": 1, "model.compute_dtype": "bfloat16", "spin.beta": (5.0,)}
    self_play(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path, ["generate", "score"])
    before = read_scores(tmp_path, 0)["logps"]
    self_play(tiny_files.make_config(tiny_model, tiny_data, changes | {"mesh.data": 2, "mesh.tensor": 2}), tmp_path)
    assert any("steps.npz holds scores of another" in message for message in caplog.messages)
    assert (read_scores(tmp_path, 0)["logps"] != before).any()
    first, second = read_metrics(tmp_path / "iteration_0" / "metrics.jsonl")
    for row in (first, second):  # the first step is of the warm-up, and changes nothing
        assert row["rewards/real"] == row["rewards/generated"] == row["rewards/margin"] == 0
        assert row["loss"] == pytest.approx(np.log(2), rel=1e-6)
    # Once the iteration has trained nobody needs them: a later start on another mesh scores nothing.
    caplog.clear()
    scored = {path: path.stat().st_mtime_ns for path in (tmp_path / "iteration_0" / "scores").iterdir()}
    self_play(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "iteration_0" / "scores").iterdir()} == scored
    assert not any("scored anew" in message for message in caplog.messages)


def test_other_settings_in_the_same_workdir_are_refused(finished, tiny_model, tiny_data):
    changed = tiny_files.make_config(tiny_model, tiny_data, {"spin.beta": (0.2,), "seed": 1})
    with pytest.raises(UserError, match=r"config.seed was 42 and is now 1, --config.spin.beta was \[0.1\] and is now"):
        open_run(changed, finished.workdir)


def test_settings_of_speed_and_length_may_change(finished, tiny_model, tiny_data, tmp_path):
    shutil.copy(finished.workdir / "config.json", tmp_path)
    changes = {"iterations": 5, "mesh.data": 2, "mesh.tensor": 2, "model.remat": "qkv", "model.logits_chunk": 4}
    changes |= {"train.checkpoint_every": 7, "train.micro_batches": 2, "train.row_length": 64}
    run = open_run(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path)
    assert run.execution.mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}


def test_values_of_iterations_to_come_may_change(finished, tiny_model, tiny_data):
    first = tiny_files.make_config(tiny_model, tiny_data).spin.beta
    longer = {"iterations": 3, "spin.beta": (first[0], first[0], 5.0)}
    open_run(tiny_files.make_config(tiny_model, tiny_data, longer), finished.workdir)
    earlier = {"iterations": 3, "spin.beta": (first[0], 5.0, 5.0)}
    with pytest.raises(UserError, match="config.spin.beta was"):
        open_run(tiny_files.make_config(tiny_model, tiny_data, earlier), finished.workdir)
    open_run(tiny_files.make_config(tiny_model, tiny_data), finished.workdir)  # leave the note as it was


def test_other_data_at_the_same_path_is_refused(tiny_model, tmp_path):
    rows = tiny_files.make_rows()
    data = tiny_files.write_jsonl(tmp_path / "rows.jsonl", rows)
    config = tiny_files.make_config(tiny_model, data)
    self_play(config, tmp_path / "run", ["generate"])
    tiny_files.write_jsonl(data, rows[::-1])
    with pytest.raises(UserError, match="is not the data that .* was started with"):
        self_play(config, tmp_path / "run")


def test_an_iteration_that_is_all_warm_up_is_refused(tiny_model, tiny_data, tmp_path):
    one_step = {"train.epochs": 1.0, "train.batch_size": 16, "train.micro_batches": 1}
    with pytest.raises(UserError, match=r"1 step\(s\) of training are all warm-up"):
        open_run(tiny_files.make_config(tiny_model, tiny_data, one_step), tmp_path)


def test_steps_are_counted_for_every_stage_and_response(tiny_model, tiny_data, tmp_path):
    """SFT's failures name SPIN's fields no more, and two responses to a prompt are two pairs."""
    one_batch = {"train.batch_size": 16, "train.micro_batches": 1}
    with pytest.raises(UserError, match=r"1 step\(s\) of training are all warm-up: raise --config.sft.epochs"):
        changes = one_batch | {"sft.epochs": 1.0, "train.epochs": 2.0}
        open_run(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path)
    with pytest.raises(UserError, match=r"16 rows x 0.5 epochs do not fill one batch of 16: .* or raise --config.sft"):
        changes = one_batch | {"sft.epochs": 0.5, "train.epochs": 2.0}
        open_run(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path)
    two = one_batch | {"train.epochs": 1.0, "generate.responses": 2}
    open_run(tiny_files.make_config(tiny_model, tiny_data, two), tmp_path)


def test_a_workdir_that_is_a_file_is_refused(tiny_model, tiny_data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        open_run(tiny_files.make_config(tiny_model, tiny_data), tmp_path / "file")


# ---- other kinds of run


def test_given_pairs_are_the_first_iterations_responses(tiny_model, tiny_data, tmp_path):
    rows = given_pairs(tiny_data)
    data = tiny_files.write_jsonl(tmp_path / "pairs.jsonl", rows)
    workdir = tmp_path / "run"
    self_play(tiny_files.make_config(tiny_model, data, {"iterations": 1}), workdir)
    assert not (workdir / "iteration_0" / "generated").exists()
    for row in read_metrics(workdir / "iteration_0" / "metrics.jsonl"):
        assert row["lengths/generated"] == 3 and row["truncated/generated"] == 0  # "zz" and the end

    config = tiny_files.make_config(tiny_model, data, {"iterations": 2})
    self_play(config, workdir, ["generate", "score"])
    assert len(read_sampled(workdir / "iteration_1" / "generated" / "pairs.parquet")) == len(rows)
    train = tiny_files.TRAIN_ROWS
    assert sorted(read_scores(workdir, 1)["iterations"].flat) == [0] * train + [1] * train


def test_sft_first_and_as_a_control(tiny_model, tiny_data, tmp_path):
    changes = {"iterations": 1, "sft.epochs": 2.0, "sft.learning_rate": 1e-3, "sft.control": True}
    rows = self_play(tiny_files.make_config(tiny_model, tiny_data, changes), tmp_path)
    assert [row["model"] for row in rows] == ["SFT", "iteration 0", "SFT control 0"]
    assert read_summary(tmp_path) == rows

    sft = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert len(sft) == 4 and sft[-1]["loss"] < sft[0]["loss"]
    assert weights(tmp_path / "sft" / "model") != weights(tiny_model)
    control = read_metrics(tmp_path / "iteration_0" / "control" / "metrics.jsonl")
    assert control[0]["loss"] < sft[0]["loss"]  # it goes on from the SFT model
    # An iteration of 2 steps samples (1 pass over x, y'), scores (1 over x, y, y') and trains (3 over them): with about
    # 15, 18 and 23 tokens some 2.4 of SFT's passes, which are 3 over x, y, at 2 steps a pass.
    assert len(control) in (4, 5)
    assert weights(tmp_path / "iteration_0" / "control" / "model") != weights(tmp_path / "iteration_0" / "model")


def test_the_papers_templates(tiny_model, tiny_data, tmp_path):
    config = tiny_files.make_config(tiny_model, tiny_data, {"iterations": 1, "data.template": "paper"})
    (row,) = self_play(config, tmp_path)[1:]
    assert 0 < row["generated/tokens"]
    run = open_run(config, tmp_path)
    example = run.train_examples[0]
    [(tokens, truncated)] = read_sampled(tmp_path / "iteration_0" / "generated" / "pairs.parquet")[example.row]
    pair = run.pair(example, (tokens, truncated), 0)
    question = example.prompt[0]["content"]
    decode = run.chat.tokenizer.decode
    assert decode(pair.prompt) == f"<|system|>\n</s>\n<|user|>\n{question}</s>\n<|assistant|>\n"
    assert decode(pair.responses[0]) == f"{question[::-1]}</s>\n</s>"
    assert example.row in read_scores(tmp_path, 0)["rows"]
