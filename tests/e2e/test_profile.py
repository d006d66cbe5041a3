"""--profile leaves a trace whose operations say which part of the model they belong to."""

import collections
import gzip
import json
import re
import shutil

import jax
import pytest
import tiny_files

from spin_jax.self_play.algorithm import self_play

SCOPES = {"embed", "attention", "mlp", "final_norm", "unembed", "loss", "optimizer"}


@pytest.fixture(scope="module")
def profile(finished, tiny_model, tiny_data, tmp_path_factory):
    """The trace's directory, of an iteration of six steps."""
    workdir = tmp_path_factory.mktemp("profiled")
    for made in ("generated", "scores"):
        shutil.copytree(finished.workdir / "iteration_0" / made, workdir / "iteration_0" / made)
    changes = {"iterations": 1, "train.epochs": 3.0}
    self_play(tiny_files.make_config(tiny_model, tiny_data, changes), workdir, profile=True)
    assert not list(workdir.rglob("*.partial"))
    (directory,) = (workdir / "iteration_0" / "profile" / "plugins" / "profile").iterdir()
    return directory


def test_the_operations_that_ran_carry_the_scopes(profile):
    (file,) = profile.glob("*.xplane.pb")
    ran = collections.Counter()  # how often each instruction of the step ran
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module") == "jit_step":
                    ran[stats["hlo_op"]] += 1
    scopes = collections.defaultdict(set)
    for instruction, path in instructions(file.read_bytes()):
        # Backward, a scope's name stands inside of brackets: "transpose(jvp(attention))".
        scopes[instruction] |= set(re.findall(r"\w+", path)) & SCOPES
    assert ran and set(ran) <= set(scopes)
    assert set().union(*scopes.values()) == SCOPES
    # A fusion has the name of one of its operations: what is small may be part of another's.
    assert set().union(*(scopes[name] for name in ran)) >= {"attention", "mlp", "unembed", "optimizer"}


def test_three_whole_steps_are_traced(profile):
    with gzip.open(profile / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if event.get("name") == "train" and event.get("ph") == "X"]
    assert [int(step["args"]["step_num"]) for step in sorted(steps, key=lambda step: step["ts"])] == [3, 4, 5]


def instructions(space: bytes) -> list[tuple[str, str]]:
    """(name, path of scopes) of the instructions of every program that an XSpace holds, by the fields' numbers in
    xplane.proto and hlo.proto of openxla."""
    plane, event_metadata, map_value, stats, bytes_value = 1, 4, 2, 5, 6
    module, computation, instruction, name, metadata, op_name = 1, 3, 2, 1, 7, 2
    programs = fields(space, plane, event_metadata, map_value, stats, bytes_value, module)
    found = [one for program in programs for one in fields(program, computation, instruction)]
    return [(b"".join(fields(one, name)).decode(), b"".join(fields(one, metadata, op_name)).decode()) for one in found]


def fields(message: bytes, *path: int) -> list[bytes]:
    """The values, strings or messages, at a path of field numbers in a protobuf message."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 2:  # with a length; the others are numbers
            length = varint()
            if tag >> 3 == path[0]:
                value = message[at : at + length]
                found += fields(value, *path[1:]) if path[1:] else [value]
            at += length
        elif tag & 7 == 0:
            varint()
        else:
            at += {1: 8, 5: 4}[tag & 7]
    return found
