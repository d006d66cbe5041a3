"""The programs of a 7B run as a TPU's compiler makes them: what is known to go wrong there has not.

A training step of 7B takes that compiler minutes. So what it made of a program is recorded in `tests/golden/tpu`, with
the hash of the lowered program and the versions: where both are the same, the record is read; where they are not, the
program is compiled anew, and the record written, to be committed with the change. How a schedule is read is tested in
`test_hlo.py`, on programs that are compiled each time.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tpu
from jax.sharding import NamedSharding

from spin_jax.compile_check import compiler
from spin_jax.compile_check.estimate import read_work
from spin_jax.compile_check.known_models import known
from spin_jax.compile_check.programs import kernel_share, make_programs
from spin_jax.config import LoraConfig, freeze, override
from spin_jax.data.packing import Packing, plan_training
from spin_jax.devices import sharding
from spin_jax.devices.accelerators import find_slice
from spin_jax.devices.compiler_options import xla_options
from spin_jax.models import Execution, abstract_adapters, abstract_params, num_params
from spin_jax.models.projections import project

ROOT = pathlib.Path(__file__).parents[2]
MODEL = known("alignment-handbook/zephyr-7b-sft-full")


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """(slice, program, layers, fields) -> the compile check's report of one program of the paper's config, sequences of
    1,024 tokens."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    without_names = importlib.import_module("unchanged").without_names

    def report(slice_name: str, name: str, layers: int, **fields):
        spec = importlib.util.spec_from_file_location("zephyr_7b", ROOT / "configs" / "zephyr_7b.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config, target = module.get_config(f"{slice_name},code"), find_slice(slice_name)
        override(config, fields)
        model = dataclasses.replace(MODEL, num_layers=layers)
        programs = make_programs(freeze(config), model, compiler.devices_of(target))
        (program,) = [one for one in programs if one.name == name]
        lowered = program.jitted.lower(*program.args)
        made_from = {
            "lowered": hashlib.sha256(without_names(lowered.as_text()).encode()).hexdigest(),
            "versions": compiler.versions(),
            "options": str(xla_options(compiler.mesh_of(program.args))),
        }
        label = "-".join([slice_name, name.replace(" ", "_"), "low_rank" if fields else "full"])
        record = ROOT / "tests" / "golden" / "tpu" / f"{label}.json"
        known_as = compiler.cache_file(lowered, target, compiler.mesh_of(program.args), tmp_path)
        recorded = json.loads(record.read_text()) if record.exists() else {"from": None}
        if recorded["from"] == made_from:
            known_as.write_text(json.dumps(recorded["compiled"]))
            return compiler.report(program, target, tmp_path)
        found = compiler.report(program, target, tmp_path)
        made = {"from": made_from, "compiled": json.loads(known_as.read_text())}
        record.write_text(json.dumps(made, indent=1) + "\n")
        return found

    return report


@tpu.needs_libtpu
def test_a_training_step_wastes_nothing_on_the_way(compiled):
    """No windowed einsum, no gradient summed in bfloat16, no weight that the chip waits for."""
    traffic = compiled("v5e-16", "train step", layers=2).work.traffic
    assert not [one for one in traffic if one.kind == "collective-permute"]
    summed = [one for one in traffic if one.kind in ("all-reduce", "reduce-scatter")]
    assert {one.dtype for one in summed} == {"f32"}
    assert sum(one.bytes for one in summed if one.is_async) > 4 * sum(one.bytes for one in summed if not one.is_async)
    gathers = [one for one in traffic if one.kind == "all-gather"]
    assert gathers and all(one.is_async for one in gathers)


@tpu.needs_libtpu
def test_low_rank_updates_cost_one_copy_of_the_model_and_no_gradient_of_it(compiled):
    layers, rank, chips = 2, 64, 8
    fields = {"lora.rank": rank, "spin.opponent": "live", "model.remat": "full", "train.micro_batches": 1}
    report = compiled("v5e-8", "train step", layers, **fields)
    model = dataclasses.replace(MODEL, num_layers=layers)
    updates = (
        sum(4 * math.prod(x.shape) for x in jax.tree.leaves(abstract_adapters(model, LoraConfig(rank=rank)))) / chips
    )
    matrices, norms = 2 * num_params(model), 2 * (2 * layers + 1) * model.hidden_size  # norms are f32, and everywhere
    assert report.bytes["opponent"] == pytest.approx(matrices / chips + norms * (2 - 1 / chips), rel=1e-6)
    assert report.bytes["adapters"] == updates
    assert report.bytes["optimizer"] == pytest.approx(updates, rel=1e-4)
    # Policy, opponent, the policy again and dx, where the model asks for three of the four; a dw would be a fifth.
    assert report.work.flops < 1.1 * 4 / 3 * report.model_flops
    summed = [one for one in report.work.traffic if one.kind in ("all-reduce", "reduce-scatter")]
    assert sum(one.bytes for one in summed) < 1.1 * chips * updates


@tpu.needs_libtpu
def test_v4_sends_a_gradient_once():
    """Taken over all 16 chips at once, libtpu's sum of a gradient sends it twice."""
    target = find_slice("v4-32")
    mesh = sharding.make_mesh(devices=compiler.devices_of(target))
    assert sharding.sum_line(mesh) == 4
    expression, axes, dims = "BTD,DF->BTF", ("embed", "mlp"), (2048, 1024)
    x = jax.ShapeDtypeStruct((16, 128, dims[0]), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    w = jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, sharding.spec(*axes)))

    def sent(line: int) -> float:
        execution = Execution(jnp.dtype(jnp.bfloat16), mesh=mesh, line=line)
        loss = lambda w, x: project(expression, x, w, axes, execution, jnp.float32).sum()  # noqa: E731
        text, _ = tpu.schedule(jax.grad(loss), w, x, out_shardings=w.sharding)
        traffic = read_work(text, target.chip, dict(mesh.shape)).traffic
        return sum(one.wire_bytes for one in traffic if one.kind in ("all-reduce", "reduce-scatter"))

    once = 4 * math.prod(dims) * 15 / 16
    assert (sent(4), sent(0)) == (once, 2 * once)


@tpu.needs_libtpu
@pytest.mark.parametrize(("slice_name", "num_shards"), [("v5e-16", 8), ("v5p-8", 4)])
def test_a_decode_step_reads_the_weights_and_the_cache_once(compiled, slice_name, num_shards):
    """Four of 32 layers, and as much of the vocabulary; on v5p-8 a chip has two kv heads, on v5e-16 one."""
    layers = 4
    report = compiled(slice_name, "decode step", layers)
    model = dataclasses.replace(MODEL, num_layers=layers)
    read = {"embed"}  # but a few rows of it
    params = [x for name, part in abstract_params(model).items() if name not in read for x in jax.tree.leaves(part)]
    weights = 2 * sum(math.prod(x.shape) for x in params) / num_shards
    cache = report.bytes["cache"]
    (token,) = [
        loop for loop in report.work.loops if loop.times == 1 and "shard_map" not in loop.name and not loop.trips
    ]
    assert token.hbm_bytes < 1.3 * (weights + cache)
    assert report.bytes["activations"] < 0.5 * cache  # no room for a second one
    traffic = report.work.traffic
    assert sum(one.times for one in traffic if (one.kind, one.dtype) == ("all-reduce", "bf16")) == 2 * layers + 1
    assert max(one.bytes for one in traffic) < 0.1 * cache  # what travels is activations, and nothing of the cache


def share(lengths: list[tuple[int, int, int]], kernel: str = "flash") -> float:
    """Of tiles of 256, in one row of up to 4,096 slots."""
    mesh = sharding.one_device_mesh()
    execution = Execution(jnp.bfloat16, kernel=kernel, mesh=mesh)
    pairs = tiny.pairs(tuple(lengths))
    return kernel_share(
        MODEL, execution, pairs, plan_training(pairs, np.arange(len(pairs))[None], Packing(1, 128, 4096))
    )


def test_share_of_the_tiles_that_kernels_visit():
    """Of a triangle of I (I + 1) / 2 tiles: all but the square in which the second response would see the first; of
    pairs within tiles the diagonal alone. cuDNN skips nothing."""
    one = [(1024, 1537, 1537)]  # whole tiles, as the last token of a response has no slot
    assert share(one) == 1 - 6 * 6 / (16 * 17 / 2)
    assert share(one) == pytest.approx(1 - 1536**2 / (4096**2 / 2), abs=0.02)
    assert share([(1024, 3073, 1)]) == 1
    assert share([(32, 17, 17)] * 64) == 16 / (16 * 17 / 2)
    assert share(one, "cudnn") == 1
