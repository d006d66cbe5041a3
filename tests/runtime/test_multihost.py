"""What several processes do together, by real processes: exchanges, batches, loading and saving a model."""

import json
import pathlib
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny
import tiny_files
from etils import epath
from jax.sharding import Mesh
from processes import ROOT, free_port, run_command, run_together

from spin_jax import checkpoints, models
from spin_jax.checkpoints import safetensors
from spin_jax.config import GenerateConfig, TrainConfig
from spin_jax.devices.sharding import AXES, batch_sharding, make_mesh, one_device_mesh
from spin_jax.devices.transfer import to_devices, to_host
from spin_jax.errors import UserError
from spin_jax.evaluation.scoring import Scorer
from spin_jax.generation.decode_state import Responses
from spin_jax.generation.engine import Engine, Prompt, _own_responses
from spin_jax.runtime import compilation_cache, multihost

ITEMS = 20_000  # more than one exchange's
MEBIBYTE = 2**20
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "vocab_size": 1024,
}


def run_here(function, processes: int, *arguments, devices: int) -> list[str]:
    """`function` of this file in several processes, with `arguments`; what each printed."""
    address = f"127.0.0.1:{free_port()}"
    paths = [str(ROOT / "tests"), str(ROOT / "tests" / "runtime")]
    code = f"import sys; sys.path[:0] = {paths}; import test_multihost; test_multihost.{function.__name__}"
    commands = [["-c", f"{code}({(address, processes, i, *arguments)!r})"] for i in range(processes)]
    ended = run_together(commands, devices=devices)
    assert [process.status for process in ended] == [0] * processes, "\n".join(process.output for process in ended)
    return [process.output.splitlines()[-1] for process in ended]


def refusal(function, *arguments) -> str:
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


# ---- exchanges


def exchange(arguments: tuple):
    """Run by each of two processes."""
    address, processes, process, directory = arguments
    multihost.start(address, processes, process)
    assert multihost.are_several() and multihost.is_first() == (process == 0)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.keep(epath.Path(directory) / "run")
    assert jax.config.jax_compilation_cache_dir == f"{directory}/compiled", "beside the workdir, where all see it"
    assert multihost.gather({"me": process, "long": "x" * process * 5000}) == [
        {"me": 0, "long": ""},
        {"me": 1, "long": "x" * 5000},
    ]
    made = []
    squares = multihost.parallel_map(lambda item: made.append(item) or item**2, range(ITEMS))
    assert squares == [item**2 for item in range(ITEMS)] and made == list(range(process, ITEMS, 2))
    assert multihost.parallel_map(str, []) == [] and multihost.parallel_map(str, [5]) == ["5"]
    assert multihost.on_process_zero(lambda: process) == 0 and multihost.on_each_process(lambda: process) == process
    multihost.GATHERED = 2
    own = [f"{process}{i}" for i in range(1 + 4 * process)]
    assert multihost.gather_lists(own) == ["00", "10", "11", "12", "13", "14"] and multihost.gather_lists([]) == []
    for flags in ((0, 0), (0, 1), (1, 0)):
        assert bool(multihost.any_process(bool(flags[process]))) == any(flags)

    # A mistake that one of them makes is everybody's.
    def mistaken(item: int) -> int:
        if item == 3:  # in the second one's share
            raise UserError("row 3 is wrong")
        return item

    assert refusal(multihost.parallel_map, mistaken, range(6)) == "row 3 is wrong"
    assert refusal(multihost.on_process_zero, lambda: mistaken(3)) == "row 3 is wrong"
    config = tiny_files.make_config("model", "data", {"seed": 7 * process})
    assert refusal(multihost.check_alike, config) == (
        "--config.seed is 0 for process 0 and 7 for process 1: start all with the same settings"
    )
    multihost.check_shared(pathlib.Path(directory))
    own = pathlib.Path(directory) / str(process)
    own.mkdir()
    assert "process 1 does not see what process 0 writes" in refusal(multihost.check_shared, own)

    _rows_of_each()
    _rows_that_two_hold()
    _sampled_and_scored_by_both()


def _rows_of_each():
    rows_BT = np.arange(24).reshape(8, 3)
    mesh = make_mesh()
    array = to_devices(rows_BT, batch_sharding(mesh))
    assert [shard.index[0].start for shard in array.addressable_shards] == [
        4 * jax.process_index() + 2 * i for i in (0, 1)
    ]
    np.testing.assert_array_equal(to_host(array * 2), rows_BT * 2)


def _rows_that_two_hold():
    """With a tensor axis that spans the hosts both hold all rows; each row is answered for once."""
    devices = np.array(jax.devices()).reshape(2, 2).T  # by process; then tensor is the axis of processes
    rows = batch_sharding(Mesh(devices[None], AXES))
    prompt_index_B, tokens_BO = np.array([2, -1, 0, 1]), np.arange(12).reshape(4, 3)  # one of the four is empty
    stopped_B = np.array([True, True, False, True])
    drawn = Responses(prompt_index_B, tokens_BO, -tokens_BO.astype(np.float32), np.array([1, 2, 3, 3]), stopped_B)
    prompts = [Prompt(row, 0, np.zeros(1, np.int32)) for row in (5, 6, 7)]
    own = _own_responses(to_devices(drawn, rows), prompts)
    answers = multihost.gather_lists([(a.row, a.tokens.tolist(), a.truncated) for a in own])
    assert sorted(answers) == [(5, [6, 7, 8], True), (6, [9, 10, 11], False), (7, [0], False)]


def _sampled_and_scored_by_both():
    """On a mesh of both, with params of numpy or of one device, every process gets what one device gives."""
    rng, train = np.random.default_rng(0), TrainConfig(row_length=64, length_multiple=16, micro_batches=1)
    settings = GenerateConfig(max_new_tokens=6, batch_size=4, prefill_batch_size=4, prompt_bucket=16, responses=2)
    prompts = [tiny.tokens(rng, length) for length in (3, 9, 1, 5, 7, 2)]

    def both(mesh: Mesh, params: dict) -> tuple[list, np.ndarray]:
        execution = models.Execution(mesh=mesh)
        sampled = Engine(tiny.CONFIG, settings, execution, stop_ids=(3, 9)).generate(params, prompts)
        responses = [[one.tokens for one in sampled if one.row == row] for row in range(len(prompts))]
        logps = Scorer(tiny.CONFIG, train, execution).logprobs(params, prompts, responses)
        np.testing.assert_allclose(logps.ravel(), [one.logprobs.sum() for one in sampled], atol=1e-4)
        return [(one.row, one.number, one.tokens.tolist()) for one in sampled], logps

    expected, logps = both(one_device_mesh(), tiny.host_params())
    for params in (tiny.host_params(), tiny.params()):
        drawn, scored = both(make_mesh(), params)
        assert drawn == expected
        np.testing.assert_allclose(scored, logps, atol=1e-5)


def test_two_processes_agree_and_share(tmp_path):
    run_here(exchange, 2, str(tmp_path), devices=2)


# ---- a model


def load_and_save(arguments: tuple):
    """Run by each process; prints how many bytes it took for itself, at most, while it loaded and while it saved."""
    address, processes, process, directory = arguments
    if processes > 1:
        multihost.start(address, processes, process)
    source = pathlib.Path(directory) / "model"
    config = checkpoints.read_config(source)
    shardings = models.param_shardings(make_mesh(), config)
    multihost.gather(None)  # connected
    params = {}
    loading = _most_memory(lambda: params.update(checkpoints.load(source, shardings=shardings)[1]))
    target = pathlib.Path(directory) / f"saved_by_{processes}"
    saving = _most_memory(lambda: checkpoints.save(target, config, params, source=source, dtype=np.float32))
    multihost.gather(None)
    print(json.dumps({"loading": loading, "saving": saving}))


def _most_memory(work) -> int:
    """Bytes of anonymous memory that this process has more at one time during `work` than before it. Mapped files do
    not count: their pages are the kernel's to drop."""

    def now() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    before, most, done = now(), [0], threading.Event()

    def watch():
        while not done.is_set():
            most.append(now())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(*most, now()) - before


@pytest.fixture(scope="module")
def large_model(tmp_path_factory) -> pathlib.Path:
    """A directory with `model/`, 220 MiB of random f32 weights."""
    directory = tmp_path_factory.mktemp("large")
    config = models.ModelConfig.from_huggingface(tiny_files.HUGGINGFACE | LARGE, "large")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), models.abstract_params(config))
    checkpoints.save(directory / "model", config, params, token_ids={"eos_token_id": 1}, dtype=np.float32)
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_host_holds_its_share_of_a_model_and_no_more(large_model):
    """A host that read the whole, or gathered it to save it, would take twice what is allowed here."""
    weights = large_model / "model" / "model.safetensors"
    size, slack = weights.stat().st_size, 16 * MEBIBYTE
    tensors = [np.prod(stored.shape) * 4 for stored in safetensors.read_header(weights).values()]
    largest = LARGE["num_hidden_layers"] * max(tensors)  # of the params: an MLP weight of all layers
    (alone,) = run_here(load_and_save, 1, str(large_model), devices=1)
    assert size < json.loads(alone)["loading"] < size + largest + slack  # what is loaded is seen
    for printed in run_here(load_and_save, 2, str(large_model), devices=1):
        took = json.loads(printed)
        # The allocator may hold on to the copy of the param before while the next is read: two shares of the largest.
        assert size / 2 < took["loading"] < size / 2 + 2 * largest / 2 + slack < size
        assert took["saving"] < size / 2  # a tensor at a time; the other half would be this much
    for saved in ("saved_by_1", "saved_by_2"):
        assert (large_model / saved / "model.safetensors").read_bytes() == weights.read_bytes()


# ---- mistakes


def test_data_that_one_host_misses_is_one_line_on_all(tmp_path):
    tiny_files.write_model(tmp_path / "model")
    directories = [tmp_path / "first", tmp_path / "second"]
    for directory in directories:
        directory.mkdir()
    tiny_files.write_jsonl(directories[0] / "rows.jsonl", tiny_files.make_rows())
    settings = tiny_files.SETTINGS | {"model.path": tmp_path / "model", "data.train": "rows.jsonl"}
    overrides = [f"--config.{field}={value}" for field, value in settings.items()]
    arguments = [f"--config={ROOT / 'configs' / 'base.py'}", f"--workdir={tmp_path / 'run'}", *overrides]
    ended = run_command(arguments, 2, devices=1, directories=directories)
    for process in ended:
        assert process.status == 2 and "Traceback" not in process.output, process.output
        assert process.output.splitlines()[-1].startswith("spin_jax: rows.jsonl: no such file")
