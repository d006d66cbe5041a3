"""Low-rank updates of a frozen model: what they compute, what they train, where they lie."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.config import LoraConfig
from spin_jax.data.packing import Packing
from spin_jax.devices import sharding
from spin_jax.models import (
    Dropout,
    Execution,
    abstract_adapters,
    adapter_shardings,
    attach,
    forward,
    init_adapters,
    merge,
    param_shardings,
)
from spin_jax.models.projections import Adapted, project_adapted
from spin_jax.models.weights import weights
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import Settings, batch_loss
from spin_jax.objectives.logprobs import pair_logprobs
from spin_jax.training import programs
from spin_jax.training.optimizer import make_optimizer
from spin_jax.training.train_step import init_state, make_step, on_adapters

LORA, BETA = LoraConfig(rank=4, alpha=2.0), 0.1
SCALE = LORA.scale
COMPUTE = Execution(remat="none")

PACKING = Packing(8, 8, 1)  # eight rows, for any mesh


def adapters(seed: int = 1) -> dict:
    """As after some training: b is not zero."""
    fresh = init_adapters(tiny.CONFIG, LORA, jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(fresh)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@functools.cache
def batch():
    """Pairs with the log-probs that the frozen model gives them."""
    pairs = tiny.pairs()
    logps = logprobs(tiny.params(), tiny.packed(pairs, PACKING).arrays)
    return tiny.packed(pairs, PACKING, opponent_logps=np.asarray(logps)[tiny.places(pairs, PACKING)]).arrays


logprobs = jax.jit(lambda params, batch: pair_logprobs(tiny.CONFIG, params, batch, COMPUTE))


def assert_close(actual, expected, share: float) -> None:
    """Every leaf within `share` of the expected leaf's largest element."""
    for (path, ours), leaf in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        atol = share * np.max(np.abs(leaf))
        np.testing.assert_allclose(ours, leaf, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


# ---- what they compute


def test_fresh_updates_change_nothing_at_all():
    """Not by a bit: an iteration starts with margins of exactly 0."""
    fresh = init_adapters(tiny.CONFIG, LORA, jax.random.key(0))
    attached = jax.jit(
        lambda base, fresh, batch: pair_logprobs(tiny.CONFIG, attach(base, fresh, SCALE), batch, COMPUTE)
    )
    np.testing.assert_array_equal(attached(tiny.params(), fresh, batch()), logprobs(tiny.params(), batch()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        inputs = math.prod(leaf.shape[1:-1])
        if path[-1].key == "a":  # uniform in +-1 / sqrt(inputs)
            assert 0.9 < np.max(np.abs(leaf)) * math.sqrt(inputs) <= 1
            assert not np.array_equal(leaf[0], leaf[1])  # each layer has its own
        else:
            assert not np.any(leaf)


@pytest.mark.parametrize("remat", ["none", "mlp"])
def test_attached_is_merged(remat):
    """x w + (x a) b is x (w + a b), in the forward and in the backward pass."""
    tokens_BT = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % tiny.CONFIG.vocab_size

    def loss(make, adapters):
        hidden_BTD, _ = forward(
            tiny.CONFIG, make(tiny.params(), adapters, SCALE), tokens_BT, execution=Execution(remat=remat)
        )
        return jnp.sum(jnp.sin(hidden_BTD)), hidden_BTD

    gradient = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    grads, hidden_BTD = gradient(attach, adapters())
    merged_grads, merged_BTD = gradient(merge, adapters())  # the chain rule of the whole dw, by jax
    assert np.max(np.abs(merged_BTD - forward(tiny.CONFIG, tiny.params(), tokens_BT)[0])) > 0.1
    assert_close(hidden_BTD, merged_BTD, 2e-6)
    assert_close(grads, merged_grads, 1e-5)


def test_gradients_are_those_of_the_equations_and_the_frozen_weight_has_none():
    """da = x^T dy b^T, db = (x a)^T dy; and no more FLOPs than these, dx and the forward pass take."""
    rng = np.random.default_rng(0)
    B, T, D, F, R = 4, 8, 64, 96, 2
    x, w, a, b, dy = (
        jnp.array(rng.standard_normal(shape, np.float32)) for shape in ((B, T, D), (D, F), (D, R), (R, F), (B, T, F))
    )

    @jax.jit
    def pullback(x, w, a, b, dy):
        def function(x, a, b):
            return project_adapted("BTD,DF->BTF", x, Adapted(w, a, b), ("embed", "mlp"), COMPUTE, x.dtype)

        y, vjp = jax.vjp(function, x, a, b)
        return y, *vjp(dy)

    arguments = (x, w, a, b, dy)
    y, dx, da, db = pullback(*arguments)
    rows = lambda x: np.asarray(x, np.float64).reshape(B * T, -1)  # noqa: E731
    w, a, b = (np.asarray(each, np.float64) for each in (w, a, b))
    expected = (rows(x) @ (w + a @ b), rows(dy) @ (w + a @ b).T, rows(x).T @ rows(dy) @ b.T, (rows(x) @ a).T @ rows(dy))
    for actual, each in zip((rows(y), rows(dx), da, db), expected, strict=True):
        np.testing.assert_allclose(actual, each, rtol=1e-4, atol=1e-4)
    flops = pullback.lower(*arguments).compile().cost_analysis()["flops"]
    frozen, low_rank = 2 * B * T * D * F, 2 * B * T * R * (D + F)
    assert 2 * frozen + 3 * low_rank <= flops < 2.2 * frozen + 3 * low_rank


# ---- what they train


OPTIMIZER = make_optimizer("rmsprop", optax.constant_schedule(1e-2), 1.0, 0.0)


def lora_step(live: bool, micro_batches: int = 1, optimizer: optax.GradientTransformation = OPTIMIZER, dropout=None):
    objective = on_adapters(batch_loss(OBJECTIVES["logistic"], Settings(beta=BETA), tiny.CONFIG, COMPUTE), SCALE, live)
    return make_step(objective, optimizer, micro_batches, dropout)


@pytest.mark.parametrize("live", [False, True])
def test_training_wins_and_the_frozen_model_stays(live):
    base, before = tiny.params(), tiny.host_params()
    step = jax.jit(lora_step(live), donate_argnums=0)
    state = init_state(init_adapters(tiny.CONFIG, LORA, jax.random.key(0)), OPTIMIZER)
    # As a run scores a stored opponent: by the step itself.
    state, _, scored_BPY = step(state, base, batch(), True)
    history, scored = [], batch()._replace(reference_logps_BPY=scored_BPY)
    for _ in range(6):
        state, metrics, _ = step(state, base, scored)
        history.append(metrics)
    np.testing.assert_allclose(history[0]["loss"], math.log(2), rtol=2e-7)
    if live:  # another part of the program, which a compiler may fuse otherwise
        assert abs(history[0]["rewards/margin"]) < 1e-6
    else:
        assert history[0]["rewards/margin"] == history[0]["rewards/accuracy"] == 0
    assert history[-1]["loss"] < 0.9 * math.log(2) and history[-1]["rewards/accuracy"] == 1
    jax.tree.map(np.testing.assert_array_equal, base, before)
    kinds = {leaf.shape for leaf in jax.tree.leaves(abstract_adapters(tiny.CONFIG, LORA))} | {()}
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == kinds  # what a checkpoint holds
    # Merged, the policy gives the log-probs that it was trained with.
    merged_P2 = logprobs(merge(base, state.params, SCALE), batch())[tiny.places(tiny.pairs(), PACKING)]
    _, metrics, _ = step(state, base, batch())
    np.testing.assert_allclose(metrics["logps/real"], np.mean(merged_P2[:, 0]), rtol=1e-5)


def test_stored_and_live_opponent_and_micro_batches_agree():
    kept = optax.trace(decay=0.0)  # the optimizer's state is the gradient

    def gradient(live: bool, micro_batches: int) -> tuple[dict, dict]:
        step = jax.jit(lora_step(live, micro_batches, kept))
        state, metrics, _ = step(init_state(adapters(), kept), tiny.params(), batch())
        return state.opt_state.trace, metrics

    expected = gradient(False, 1)
    for live, micro_batches in ((True, 1), (False, 4)):
        assert_close(gradient(live, micro_batches), expected, 1e-5)


# ---- what drops out


def test_what_drops_out_of_an_update_and_what_does_not():
    """x w + (drop(x) a) b, with a share of the numbers of x at 0 and the others divided by what is left."""
    rng = np.random.default_rng(0)
    x, w, a, b = (
        jnp.array(rng.standard_normal(shape, np.float32)) for shape in ((9, 50, 40), (40, 8), (40, 2), (2, 8))
    )
    dropout = Dropout(jax.random.key(1), jnp.float32(0.3))
    dropped = np.asarray(dropout(x))
    assert np.mean(dropped == 0) == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(dropped[dropped != 0], np.asarray(x)[dropped != 0] / 0.7, rtol=1e-6)
    np.testing.assert_array_equal(dropout._replace(rate=jnp.float32(0))(x), x)
    y = project_adapted("BTD,DF->BTF", x, Adapted(w, a, b, dropout), ("embed", "mlp"), COMPUTE, x.dtype)
    np.testing.assert_allclose(y, x @ w + (dropped @ a) @ b, rtol=0, atol=1e-4)


def test_what_drops_out_does_not_depend_on_the_mesh():
    mesh = sharding.make_mesh(2, 2, 2)
    base = jax.device_put(tiny.host_params(), param_shardings(mesh, tiny.CONFIG))
    dropout = Dropout(jax.random.key(0), jnp.float32(0.5))

    def dropped(params: dict, execution: Execution, batch) -> jax.Array:
        attached = jax.jit(lambda p, a, d: pair_logprobs(tiny.CONFIG, attach(p, a, SCALE, d), batch, execution))
        return attached(params, adapters(), dropout)

    rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
    alone, split = dropped(tiny.params(), COMPUTE, batch()), dropped(base, Execution(mesh=mesh), rows)
    np.testing.assert_allclose(split, alone, rtol=1e-5)
    assert np.max(np.abs(alone - logprobs(merge(tiny.params(), adapters(), SCALE), batch()))) > 1e-2


def test_each_matrix_of_each_layer_drops_numbers_of_its_own():
    attached = attach(tiny.params(), adapters(), SCALE, Dropout(jax.random.key(0), jnp.float32(0.5)))
    keys = [
        tuple(jax.random.key_data(key).tolist())
        for block in ("attention", "mlp")
        for weight in attached["layers"][block].values()
        if isinstance(weight, Adapted)
        for key in weight.dropout.key
    ]
    assert len(set(keys)) == len(keys) == 7 * tiny.CONFIG.num_layers


def test_a_step_with_dropout_starts_at_l_of_zero_and_scores_without():
    """While b is 0 it makes no difference, to the bit. Then what drops out is a function of (seed, step, micro-batch):
    of the step in training, and of nothing in scoring, where nothing does."""
    kept = optax.trace(decay=0.0)  # the optimizer's state is the gradient
    step = jax.jit(lora_step(live=False, micro_batches=2, optimizer=kept, dropout=(0.5, 7)))
    fresh = init_state(init_adapters(tiny.CONFIG, LORA, jax.random.key(0)), kept)
    _, _, scored_BPY = step(fresh, tiny.params(), batch(), True)
    state, metrics, logps_BPY = step(fresh, tiny.params(), batch()._replace(reference_logps_BPY=scored_BPY), False)
    np.testing.assert_array_equal(logps_BPY, scored_BPY)
    assert metrics["loss"] == pytest.approx(math.log(2), rel=2e-7) and metrics["rewards/margin"] == 0
    without = jax.jit(lora_step(live=False, micro_batches=2, optimizer=kept))
    assert not np.allclose(*(jax.tree.leaves(s(fresh, tiny.params(), batch(), False)[0])[-2] for s in (step, without)))

    trained = init_state(adapters(), kept)
    expected = without(trained, tiny.params(), batch(), True)[2]
    np.testing.assert_allclose(step(trained, tiny.params(), batch(), True)[2], expected, rtol=1e-6)
    first, again = (step(trained, tiny.params(), batch(), False)[2] for _ in range(2))
    later = step(trained._replace(step=jnp.int32(1)), tiny.params(), batch(), False)[2]
    other = jax.jit(lora_step(live=False, micro_batches=2, optimizer=kept, dropout=(0.5, 8)))
    np.testing.assert_array_equal(first, again)
    there = np.asarray(expected) != 0
    for logps in (later, other(trained, tiny.params(), batch(), False)[2], expected):
        assert np.all(np.abs(np.asarray(first) - logps)[there] > 1e-5)


# ---- which weights they update


def test_target_modules_are_hugging_faces_names_and_the_others_stay():
    named = {weight.module for weight in jax.tree.leaves(weights(tiny.CONFIG)["layers"]) if weight.inputs}
    assert named == set(LoraConfig().target_modules)
    lora = LoraConfig(rank=2, target_modules=("v_proj", "up_proj"))
    fresh = init_adapters(tiny.CONFIG, lora, jax.random.key(0))
    assert {block: set(pairs) for block, pairs in fresh["layers"].items()} == {"attention": {"v"}, "mlp": {"up"}}
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(lambda x: x.shape, abstract_adapters(tiny.CONFIG, lora))
    only_mlp = init_adapters(tiny.CONFIG, dataclasses.replace(lora, target_modules=("down_proj",)), jax.random.key(0))
    assert set(only_mlp["layers"]) == {"mlp"}
    base, updated = tiny.params(), merge(tiny.params(), jax.tree.map(lambda x: x + 0.1, fresh), SCALE)
    changed = {
        path[-1].key
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(updated), strict=True
        )
        if np.any(before != after)
    }
    assert changed == {"v", "up"}


def test_rank_stabilised_scaling():
    assert LoraConfig(rank=64, alpha=16.0).scale == 0.25
    assert LoraConfig(rank=64, alpha=16.0, use_rslora=True).scale == 2.0


# ---- where they lie


def two_steps(sizes: tuple[int, int, int], line: int = 0) -> tuple[dict, dict]:
    """The merged params and the metrics after two steps on a mesh, by the programs that a run uses."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    execution = Execution(mesh=mesh, line=line)
    base = jax.device_put(tiny.host_params(), param_shardings(mesh, tiny.CONFIG))
    fresh = programs.make_adapters(tiny.CONFIG, LORA, mesh)(jax.random.key(3))
    objective = on_adapters(
        batch_loss(OBJECTIVES["logistic"], Settings(beta=BETA), tiny.CONFIG, execution), SCALE, live=True
    )
    # Linear in the gradient: RMSProp makes a whole step of a rounding where the gradient is near 0.
    init, step = programs.jit_training(objective, optax.sgd(1.0, momentum=0.9), 1, fresh, mesh)
    state, rows = init(fresh), jax.device_put(batch(), sharding.batch_sharding(mesh))
    for _ in range(2):
        state, metrics, _ = step(state, base, rows)
    assert jax.tree.map(lambda x: x.sharding, state.params) == adapter_shardings(mesh, tiny.CONFIG, LORA)
    return jax.device_get((programs.make_merging(tiny.CONFIG, SCALE, mesh)(base, state.params), metrics))


@pytest.mark.usefixtures("all_passes")
@pytest.mark.parametrize("sizes, line", [((2, 2, 2), 0), ((1, 8, 1), 2)], ids=["three axes", "fsdp in lines of 2"])
def test_eight_devices_train_what_one_does(sizes, line):
    alone, alone_metrics = two_steps((1, 1, 1))
    merged, metrics = two_steps(sizes, line)
    # A reward is beta times a difference of two log-probs, a hundred times as large: a bit or two of each is its error.
    # KL is such a difference, of log-probs a token.
    differences = set()
    for kind, terms, factor in (("rewards/", "logps/", BETA), ("kl/", "logps_per_token/", 1.0)):
        bit = np.finfo(np.float32).eps * max(abs(alone_metrics[name]) for name in metrics if name.startswith(terms))
        for name in (name for name in metrics if name.startswith(kind)):
            np.testing.assert_allclose(metrics[name], alone_metrics[name], rtol=0, atol=4 * factor * bit, err_msg=name)
            differences.add(name)
    others = [{name: each[name] for name in each.keys() - differences} for each in (metrics, alone_metrics)]
    assert_close(*others, 1e-5)
    assert_close(merged, alone, 1e-5)


def test_each_matrix_is_split_once_where_the_mesh_divides_it():
    mesh = sharding.make_mesh(2, 2, 2)
    q, o = (adapter_shardings(mesh, tiny.CONFIG, LORA)["layers"]["attention"][name] for name in "qo")
    at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    assert q == {"a": at(None, "fsdp", None), "b": at(None, "fsdp", "tensor", None)}
    assert o == {"a": at(None, "tensor", None, "fsdp"), "b": at(None, None, "fsdp")}
    odd = adapter_shardings(mesh, tiny.CONFIG, LoraConfig(rank=3))["layers"]["attention"]["q"]
    assert odd == {"a": at(None, "fsdp", None), "b": at(None, None, "tensor", None)}
