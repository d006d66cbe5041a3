"""Names of slices, and devices as they are found, described by what JAX says of them."""

import dataclasses
import types

import pytest
from described import Described

from spin_jax.config import base_config
from spin_jax.devices.accelerators import (
    GPUS,
    TPUS,
    V5E,
    Chip,
    GiB,
    check_slice,
    chip_of,
    find_slice,
    found,
    smallest,
    tensor_shards,
    use_slice,
)
from spin_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "devices", "topology"),
    [
        ("v2-8", 8, "v2:2x2"),
        ("v3-32", 32, "v3:4x4"),
        ("v4-8", 4, "v4:2x2x1"),
        ("v4-32", 16, "v4:2x2x4"),
        ("v5e-1", 1, "v5e:1x1"),
        ("v5e-8", 8, "v5e:2x4"),
        ("v5litepod-128", 128, "v5e:8x16"),
        ("v5p-16", 8, "v5p:2x2x2"),
        ("v5p-384", 192, "v5p:4x4x12"),
        ("v5p-768", 384, "v5p:4x8x12"),
        ("v5p-12288", 6144, "v5p:16x16x24"),
        ("v6e-64", 64, "v6e:8x8"),
        ("tpu7x-16", 16, "tpu7x:2x2x2"),
        ("h100-4", 4, ""),
        ("a100-80gb-8", 8, ""),
        ("l4-1", 1, ""),
        ("cpu", 1, ""),
    ],
)
def test_every_slice_has_its_devices_and_its_torus(name, devices, topology):
    found = find_slice(name)
    assert (found.devices, found.topology) == (devices, topology)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-17", "'v5e-17' is not a slice: near to it are v5e-8, v5e-16, v5e-32"),
        ("v5p-9", "'v5p-9' is not a slice: near to it are v5p-8, v5p-16, v5p-32"),
        ("v6e-512", "'v6e-512' is not a slice: near to it are v6e-64, v6e-128, v6e-256"),
        ("h100-0", "'h100-0' is not a slice: write a TPU's type, as v5e-16"),
        ("v9-8", "'v9-8' is not a slice: write a TPU's type"),
        ("v5e", "'v5e' is not a slice: write a TPU's type"),
    ],
)
def test_what_is_no_slice_is_one_line(name, message):
    with pytest.raises(UserError) as caught:
        find_slice(name)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        (Described("tpu", "TPU v3"), TPUS["v3"].chip),
        (Described("tpu", "TPU v5 lite", 16 * GiB), TPUS["v5e"].chip),  # the compiler's limit, not the runtime's
        (Described("tpu", "TPU v5"), TPUS["v5p"].chip),
        (Described("tpu", "TPU7x"), TPUS["tpu7x"].chip),
        (Described("gpu", "NVIDIA A100-SXM4-40GB"), GPUS["a100"]),
        (Described("gpu", "NVIDIA A100-SXM4-80GB"), GPUS["a100-80gb"]),
        (Described("gpu", "NVIDIA L4"), GPUS["l4"]),
        (Described("gpu", "NVIDIA L40S"), GPUS["l40s"]),
        (Described("gpu", "Tesla T4", 13 * GiB), dataclasses.replace(GPUS["t4"], hbm_bytes=13 * GiB)),
        (Described("gpu", "of another maker", 9 * GiB), Chip("of another maker", 9 * GiB)),
    ],
)
def test_devices_are_known_by_their_kind(device, chip):
    assert found([device] * 4) == dataclasses.replace(found([device]), devices=4)
    assert chip_of(device) == chip


def test_cpu_devices_share_the_memory_of_the_machine():
    one, eight = (found([Described("cpu", "cpu")] * n).chip.hbm_bytes for n in (1, 8))
    assert 0 < eight == one / 8


def test_slices_that_are_large_enough():
    assert smallest(100 * GiB) == ["v2-32", "v3-8", "v4-8", "v5e-8", "v5p-8", "v6e-4", "tpu7x-8"]
    assert V5E.hbm_bytes * 4 < 100 * GiB < V5E.hbm_bytes * 8


@pytest.mark.parametrize(
    ("devices", "batch_size", "num_shards"),
    [(1, 64, 1), (8, 8, 1), (8, 4, 2), (32, 64, 1), (64, 64, 2), (256, 64, 8), (16, 16, 2)],
)
def test_each_device_has_two_pairs(devices, batch_size, num_shards):
    assert tensor_shards(devices, batch_size) == num_shards


@pytest.mark.parametrize(("name", "devices"), [("v5e-8", 8), ("v5e-8", 16), ("h100-8", 8)])
def test_a_config_for_a_slice_is_for_that_slice(name, devices):
    config = base_config()
    use_slice(config, name)
    kinds = {"v5e-8": Described("tpu", "TPU v5 lite"), "h100-8": Described("gpu", "NVIDIA H100 80GB HBM3")}
    check_slice(config.mesh.slice, [kinds[name]] * devices)
    for others in ([kinds[name]] * 4, [kinds["h100-8" if name == "v5e-8" else "v5e-8"]] * devices):
        with pytest.raises(UserError, match=f"{name} is 8 x .*, and here are .*: start on that slice, or leave {name}"):
            check_slice(config.mesh.slice, others)


def test_kinds_have_two_spellings_and_hosts_their_own_memory():
    assert chip_of(Described("tpu", "TPU v5p")) == TPUS["v5p"].chip
    hosts = [types.SimpleNamespace(platform="cpu", device_kind="cpu", process_index=i // 2) for i in range(8)]
    assert found(hosts).chip.hbm_bytes == found(hosts[:2]).chip.hbm_bytes
