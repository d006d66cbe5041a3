import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spin_jax.checkpoints.train_state import KEEP, Checkpoints, checksum
from spin_jax.training.train_step import TrainState, init_state


def state_of(params: dict) -> TrainState:
    return init_state(params, optax.scale_by_rms())


@functools.partial(jax.jit, donate_argnums=0)
def advance(state: TrainState) -> TrainState:
    """A step that changes every array and is given the memory of the old ones."""
    return jax.tree.map(lambda x: x if x.dtype == jnp.bool_ else x + 1, state)


def zeros_like(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.device_put(jnp.zeros_like(x), x.sharding), state)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_what_is_saved_is_restored_with_its_types(tmp_path):
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.arange(3, dtype=jnp.bfloat16)}}
    state = state_of(params)._replace(step=jnp.int32(7))
    first = Checkpoints(tmp_path / "checkpoints")
    first.save(7, state, wait=True)
    first.close()

    again = Checkpoints(tmp_path / "checkpoints")
    assert again.latest_step() == 7
    restored, step = again.restore_newest(zeros_like(state))
    assert step == 7
    assert_equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)
    again.close()


def test_a_new_directory_has_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints")
    assert checkpoints.latest_step() is None
    checkpoints.close()


@pytest.mark.parametrize(
    "before, after",
    [((8, 1), (2, 4)), ((2, 2), (1, 1)), ((1, 1), (4, 2))],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_restoring_onto_another_mesh(tmp_path, before, after):
    def sharded_like(sizes: tuple[int, int]) -> TrainState:
        devices = np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes)
        split = NamedSharding(Mesh(devices, ("fsdp", "tensor")), PartitionSpec("fsdp", "tensor"))
        everywhere = NamedSharding(split.mesh, PartitionSpec())
        state = state_of({"w": jnp.arange(128.0).reshape(8, 16)})
        return jax.tree.map(lambda x: jax.device_put(x, split if x.ndim else everywhere), state)

    checkpoints = Checkpoints(tmp_path)
    state = sharded_like(before)
    checkpoints.save(3, state, wait=True)
    wanted = sharded_like(after)
    restored, _ = checkpoints.restore_newest(zeros_like(wanted))
    assert_equal(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)
    checkpoints.close()


def test_an_unfinished_checkpoint_is_not_listed(tmp_path):
    state = state_of({"w": jnp.ones((4, 4))})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, wait=True)
    (finished,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    checkpoints.close()
    # What a killed process leaves: the files, or some of them, under the temporary name.
    unfinished = tmp_path / finished.name.replace("2", "5.orbax-checkpoint-tmp")
    shutil.copytree(finished, unfinished)

    again = Checkpoints(tmp_path)
    assert again.latest_step() == 2
    again.save(5, state, wait=True)
    assert again.latest_step() == 5
    assert_equal(again.restore_newest(zeros_like(state))[0], state)
    again.close()
    assert not unfinished.exists()


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(step, state_of({"w": jnp.full(3, float(step))}))
    checkpoints.close()
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == KEEP
    again = Checkpoints(tmp_path)
    assert again.latest_step() == 5
    again.close()


def test_a_step_saved_already_is_left_as_it_is(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first = state_of({"w": jnp.zeros(3)})
    checkpoints.save(1, first, wait=True)
    checkpoints.save(1, state_of({"w": jnp.ones(3)}), wait=True)
    assert_equal(checkpoints.restore_newest(first)[0], first)
    checkpoints.close()


@pytest.mark.parametrize("devices", [1, 8])
def test_steps_that_reuse_the_memory_do_not_reach_a_checkpoint_on_its_way(tmp_path, devices):
    """Saving is asynchronous and the state is donated to the next step: if the saver only held views of the arrays,
    as numpy does on CPU, it would write later numbers. Every array here counts the steps."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:devices]), "x"), PartitionSpec("x"))
    params = {str(i): jax.device_put(jnp.zeros((8, 128 << 10), jnp.float32), sharding) for i in range(8)}  # 32 MiB
    state = advance(state_of(params))
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 16):
        old = state
        if step % 4 == 0:
            checkpoints.save(step, state)
        state = advance(state)
        # The saver's hold on an array makes JAX copy it instead; at all other steps the memory is used again.
        assert old.params["0"].is_deleted() or step % 4 == 0
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path)
    for step in (8, 12):
        restored, _ = checkpoints.read(step, state)
        assert int(restored.step) == step
        assert all(np.all(np.asarray(array) == step) for array in restored.params.values())
    checkpoints.close()


def test_a_bit_that_was_flipped_is_noticed(tmp_path):
    """Orbax has no checksum of the arrays' numbers, and reads back whatever is there."""
    rng = np.random.default_rng(0)
    states = [state_of({"w": jnp.asarray(rng.normal(size=(128, 128)), jnp.float32)}) for _ in range(2)]
    with Checkpoints(tmp_path) as checkpoints:
        for step, state in enumerate(states, start=1):
            checkpoints.save(step, state, wait=True)
    largest = max((tmp_path / "2").glob("state/**/d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2
        restored, step = checkpoints.restore_newest(states[1])
    assert step == 1
    assert_equal(restored, states[0])


@pytest.mark.parametrize("devices", [1, 8])
def test_a_checksum_sees_each_bit_and_no_layout(devices):
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:devices]), "x"), PartitionSpec("x"))
    arrays = [np.linspace(-1, 1, 64, dtype=np.float32), np.arange(16, dtype=jnp.bfloat16), np.ones(8, bool)]
    plain = sum(int(np.sum(array.view(f"u{array.dtype.itemsize}"), dtype=np.uint32)) for array in arrays) % 2**32
    assert int(checksum([jax.device_put(array, sharding) for array in arrays])) == plain
