"""The same numbers on every mesh of eight CPU devices, and refusals of meshes that cannot be."""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spin_jax.config import GenerateConfig
from spin_jax.data.packing import Packing
from spin_jax.devices import sharding
from spin_jax.errors import UserError
from spin_jax.generation.engine import Engine, Progress
from spin_jax.models import Execution, param_shardings
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import Settings, batch_loss
from spin_jax.training.optimizer import make_optimizer
from spin_jax.training.train_step import init_state, make_step, state_shardings

SIZES = {"fsdp 8": (1, 8, 1), "data 2, fsdp 4": (2, 4, 1), "data 2, fsdp 2, tensor 2": (2, 2, 2)}


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    """Over as many devices as it takes; `make_mesh` insists on all."""
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh((data, fsdp, tensor), sharding.AXES, axis_types, devices=devices)


def sharded_params(mesh: Mesh) -> dict:
    return jax.device_put(tiny.host_params(), param_shardings(mesh, tiny.CONFIG))


def optimizer() -> optax.GradientTransformation:
    """Linear in the gradient. RMSProp divides by its size, so that a rounding of a gradient near 0 is a whole step."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.9))


@functools.cache
def two_steps(sizes: tuple[int, int, int], line: int = 0) -> tuple[dict, dict]:
    """(params, metrics) after two SPIN steps on a mesh, against an opponent that says -10 of everything."""
    mesh = mesh_of(*sizes)
    params = sharded_params(mesh)
    shardings = state_shardings(optimizer(), params)
    state = jax.jit(functools.partial(init_state, optimizer=optimizer()), out_shardings=shardings)(params)
    execution = Execution(mesh=mesh, line=line) if line else Execution()
    objective = batch_loss(OBJECTIVES["logistic"], Settings(beta=0.1), tiny.CONFIG, execution)
    step = jax.jit(make_step(objective, optimizer(), 1), donate_argnums=0, out_shardings=(shardings, None, None))
    batch = tiny.packed(tiny.pairs(), Packing(8, 8, 1), opponent_logps=np.full((8, 2), -10.0)).arrays
    for _ in range(2):
        state, metrics, _ = step(state, None, jax.device_put(batch, sharding.batch_sharding(mesh)))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize(
    "sizes, line", [*((sizes, 0) for sizes in SIZES.values()), ((1, 8, 1), 4)], ids=[*SIZES, "fsdp 8 in lines of 4"]
)
def test_a_training_step_gives_the_same_on_every_mesh(sizes, line):
    """Metrics within 1e-5 of their size; params within 1e-5 of the largest of their kind."""
    alone_params, alone = two_steps((1, 1, 1))
    params, metrics = two_steps(sizes, line)
    for name, value in alone.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    leaves = zip(jax.tree_util.tree_leaves_with_path(alone_params), jax.tree.leaves(params), strict=True)
    for (path, expected), actual in leaves:
        atol = 1e-5 * np.max(np.abs(expected))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_training_moved_the_params_far_beyond_that_tolerance():
    params, _ = two_steps((1, 1, 1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        start = functools.reduce(lambda tree, key: tree[key.key], path, tiny.host_params())
        assert np.median(np.abs(leaf - start)) > 1e-4 * np.max(np.abs(start)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)])
def test_responses_are_the_same_on_one_device_and_on_eight(sizes):
    """Each device with slots and a queue of its own, some of which are empty sooner."""
    rng = np.random.default_rng(3)
    asked = [tiny.tokens(rng, length) for length in (6, 1, 3, 9, 5, 2, 4, 6, 3, 7) * 3]

    def responses(mesh: Mesh, temperature: float) -> list[tuple]:
        settings = GenerateConfig(
            temperature=temperature,
            max_new_tokens=8,
            batch_size=16,
            prefill_batch_size=8,
            tail_batch_size=1,
            prompt_bucket=16,
        )
        progress = Progress()
        engine = Engine(tiny.CONFIG, settings, Execution(mesh=mesh), stop_ids=(3, 9))
        drawn = engine.generate(sharded_params(mesh), asked, progress=progress)
        assert progress.tokens == progress.busy == sum(len(one.tokens) for one in drawn)
        return [(one.row, one.tokens.tolist(), one.truncated) for one in drawn]

    greedy, drawn = (responses(mesh_of(1, 1, 1), temperature) for temperature in (0.0, 1.0))
    assert greedy != drawn and {truncated for _, _, truncated in drawn} == {True, False}
    assert responses(mesh_of(*sizes), 0.0) == greedy
    assert responses(mesh_of(*sizes), 1.0) == drawn


# ---- where things live


def test_optimizer_moments_live_beside_their_params():
    mesh = mesh_of(2, 2, 2)
    params = sharded_params(mesh)
    for name in ("rmsprop", "adamw"):
        shardings = state_shardings(make_optimizer(name, optax.constant_schedule(1e-3), 1.0, 0.0), params)
        assert shardings.params == param_shardings(mesh, tiny.CONFIG)
        for moment in ("nu",) if name == "rmsprop" else ("mu", "nu"):
            assert optax.tree.get(shardings.opt_state, moment) == shardings.params
        scalars = {shardings.step, shardings.healthy, optax.tree.get_all_with_path(shardings.opt_state, "count")[0][1]}
        assert scalars == {NamedSharding(mesh, PartitionSpec())}


def test_every_matrix_is_split_over_all_devices_that_share_its_work():
    """A quarter of each on a device of 2 x 2 x 2 (fsdp x tensor), an eighth of fsdp 8, norms apart."""
    for sizes, share in (((2, 2, 2), 4), ((1, 8, 1), 8)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(sharded_params(mesh_of(*sizes))):
            local = leaf.addressable_shards[0].data.size
            expected = leaf.size if "norm" in path[-1].key else leaf.size // share
            assert local == expected, jax.tree_util.keystr(path)


def test_rows_are_split_over_data_and_fsdp():
    rows = jax.device_put(np.arange(16.0).reshape(8, 2), sharding.batch_sharding(mesh_of(2, 2, 2)))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 2)}


# ---- refusals


@pytest.mark.parametrize(
    "sizes, shape",
    [((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 2, 1), (4, 2, 1)), ((8, 1, 1), (8, 1, 1))],
)
def test_minus_one_takes_the_devices_that_remain(sizes, shape):
    assert sharding.make_mesh(*sizes).devices.shape == shape


@pytest.mark.parametrize("sizes", [(1, 4, 1), (1, -1, 3), (3, -1, 1), (1, 16, 1), (16, -1, 1)])
def test_a_mesh_that_is_not_all_devices_is_refused_with_some_that_are(sizes):
    with pytest.raises(UserError, match=r"do not make 8 devices.*fsdp=8 .*tensor=1 or .*fsdp=4 ") as refused:
        sharding.make_mesh(*sizes)
    assert f"--config.mesh.tensor={sizes[2]}" in str(refused.value)


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(UserError, match=r"config\.mesh\.tensor=4 does not divide the model's kv_heads axis of 2"):
        param_shardings(mesh_of(1, 2, 4), tiny.CONFIG)


def test_a_batch_that_does_not_split_is_refused_with_a_size_that_does():
    mesh = mesh_of(2, 2, 2)
    sharding.check_batch(mesh, "--config.train.batch_size", 12)
    with pytest.raises(UserError, match=r"^--config\S*batch_size=13 .* 4 devices .* as --config\S*batch_size=16$"):
        sharding.check_batch(mesh, "--config.train.batch_size", 13)


def test_rows_that_could_hold_no_pair_are_refused():
    mesh = mesh_of(2, 2, 2)
    sharding.check_pairs(mesh, 8, micro_batches=2)
    with pytest.raises(UserError, match=r"batch_size=7 pairs .* each of 4 devices .* write --config\S*batch_size=8,"):
        sharding.check_pairs(mesh, 7, micro_batches=2)
