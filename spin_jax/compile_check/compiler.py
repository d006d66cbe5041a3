"""Programs compiled ahead of time, for slices that need not be here: what each needs, does and takes on a chip.

For TPUs libtpu compiles, for a topology that it knows by name; no TPU is touched. What it says of a program is kept by
the program's content, because jax's own compilation cache cannot give such programs back.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from spin_jax.compile_check import estimate, hlo, hlo_cost
from spin_jax.compile_check.estimate import Work, read_work
from spin_jax.compile_check.programs import Program
from spin_jax.devices.accelerators import Device, Slice
from spin_jax.devices.compiler_options import xla_options
from spin_jax.errors import UserError
from spin_jax.runtime.files import user_cache, write_whole

# libtpu asks the cloud which TPU it is on, prints errors where there is no answer, and refuses to be loaded by a second
# process. What it is told of this machine has no part in what it compiles.
_WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

CACHE = user_cache("compile_check")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of a program.

    Attributes:
        memory: bytes a chip of arguments, outputs (those that take no donated argument's place), temporaries and code;
            with `needed` set, of arguments alone.
        needed: bytes a chip that it would take, where it does not fit by itself; 0 where it does.
        work: None where the schedule is not to be had: it did not fit, or is no TPU program.
    """

    memory: dict[str, float]
    needed: float
    work: Work | None


@dataclasses.dataclass(frozen=True)
class Report:
    """A program on a slice.

    Attributes:
        bytes: a chip, by kind: what it is called with, what it makes, and what else is alive ("beside: ...").
        limit: bytes of HBM that a chip has; 0: unlimited.
        model_flops: a chip's share of what the algorithm asks for.
        peak_flops: FLOP/s of a chip.
        kernel_share: as in `Program`.
        work: its kernels do that share of what the compiler was told.
    """

    program: str
    bytes: dict[str, float]
    limit: float
    model_flops: float
    peak_flops: float
    kernel_share: float
    work: Work | None

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return not self.limit or self.total_bytes <= self.limit

    @property
    def seconds(self) -> float:
        """Estimated time of a run; 0 where there is no estimate."""
        return sum(self.work.seconds.values()) if self.work else 0.0

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the chip could do in the estimated time; 0 where there is no estimate."""
        return self.model_flops / (self.peak_flops * self.seconds) if self.seconds else 0.0

    def as_json(self) -> dict:
        derived = {name: getattr(self, name) for name in ("total_bytes", "fits", "seconds", "mfu")}
        return dataclasses.asdict(self) | derived


def devices_of(target: Slice) -> list[Device]:
    """The devices of a slice: described by libtpu for a TPU, this machine's for the rest.

    Raises:
        UserError: libtpu is not installed, or this machine has too few devices of the kind.
    """
    if not target.topology:
        platform = "gpu" if target.chip.clock == 0 and target.chip.flops else "cpu"
        try:
            found = jax.devices(platform)
        except RuntimeError:
            found = []
        if len(found) < target.devices:
            raise UserError(
                f"{target.devices} x {target.chip.name} cannot be compiled for here: XLA's {platform} compiler needs "
                f"the devices themselves, and this machine has {len(found)}; TPU slices need none"
            )
        return found[: target.devices]
    if not importlib.util.find_spec("libtpu") and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError("the compiler for TPUs is not installed: pip install 'jax[tpu]' brings the libtpu of this jax")
    for variable, value in _WITHOUT_A_TPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options = dict(target.options)
    return list(topologies.get_topology_desc(topology_name=target.topology, platform="tpu", **options).devices)


def report(program: Program, target: Slice, cache: pathlib.Path | None = CACHE) -> Report:
    """Compiles a program for a slice, or remembers having done so, and adds up.

    Args:
        cache: directory of what was compiled before; None compiles anew and keeps nothing.
    """
    lowered = program.jitted.lower(*program.args)
    mesh = mesh_of(program.args)
    compiled = _remembered(lowered, target, mesh, cache)
    held = held_bytes(program.kinds, program.args)
    memory = dict(compiled.memory)
    # Tiles pad what the shapes say, and arguments that are not used are not passed, but live all the same.
    padding = max(0.0, memory.pop("arguments") - sum(held.values()))
    made = {"padding": padding} | memory
    if compiled.needed:
        made = {"activations": max(0.0, compiled.needed - sum(held.values()))}
    inside = _by_kind(program.inside)
    made["activations"] -= sum(inside.values())
    beside = {f"beside: {kind}": size for kind, size in _by_kind(program.beside).items()}
    return Report(
        program=program.name,
        bytes={kind: size for kind, size in (held | inside | made | beside).items() if size},
        limit=target.chip.hbm_bytes,
        model_flops=program.model_flops / target.devices,
        peak_flops=target.chip.flops,
        kernel_share=program.kernel_share,
        work=compiled.work and compiled.work.with_kernels(program.kernel_share, target.chip.flops),
    )


def held_bytes(kinds: Any, args: Any) -> dict[str, float]:
    """Bytes a device of the arrays in `args`, by kind; `kinds` is a prefix of the tree."""
    held: dict[str, float] = {}

    def add(kind: str, tree: Any) -> None:
        for leaf in jax.tree.leaves(tree):
            shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
            held[kind] = held.get(kind, 0.0) + math.prod(shape) * leaf.dtype.itemsize

    jax.tree.map(add, kinds, args)
    return held


def _by_kind(trees: Mapping[str, Any]) -> dict[str, float]:
    return {kind: sum(held_bytes(kind, tree).values()) for kind, tree in trees.items()}


def mesh_of(args: Any) -> Mesh:
    """The mesh that a program's arguments lie on."""
    meshes = (getattr(leaf.sharding, "mesh", None) for leaf in jax.tree.leaves(args))
    return next(mesh for mesh in meshes if isinstance(mesh, Mesh))


def _remembered(lowered: jax.stages.Lowered, target: Slice, mesh: Mesh, cache: pathlib.Path | None) -> Compiled:
    if cache is None:
        return _compile(lowered, target, mesh)
    file = cache_file(lowered, target, mesh, cache)
    if file.exists():
        fields = json.loads(file.read_text())
        return Compiled(**fields | {"work": Work.from_json(fields["work"]) if fields["work"] else None})
    compiled = _compile(lowered, target, mesh)
    write_whole(file, json.dumps(dataclasses.asdict(compiled)))
    return compiled


def cache_file(lowered: jax.stages.Lowered, target: Slice, mesh: Mesh, cache: pathlib.Path) -> pathlib.Path:
    """Where a `Compiled` is kept, as JSON: by the program, the slice, the versions, and the code that reads it."""
    modules = (hlo.__file__, hlo_cost.__file__, estimate.__file__, __file__)
    sources = [pathlib.Path(file).read_text() for file in modules]
    placed = [str(target), str(dict(mesh.shape)), str([device.id for device in mesh.devices.flat])]
    placed.append(str(xla_options(mesh)))
    content = "\n".join([lowered.as_text(), *placed, versions(), *sources])
    return cache / f"{hashlib.sha256(content.encode()).hexdigest()}.json"


def versions() -> str:
    """Of what compiles: "jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.42.1"."""
    found = {package.name: package.version for package in importlib.metadata.distributions(name="libtpu")}
    found |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return ", ".join(f"{name} {found[name]}" for name in ("jax", "jaxlib", "libtpu") if name in found)


def _compile(lowered: jax.stages.Lowered, target: Slice, mesh: Mesh) -> Compiled:
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True} if target.topology else None
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled({"arguments": 0.0}, _needed(str(error)), None)
        memory = _memory(compiled.memory_analysis(), bool(target.topology))
        schedules = list(pathlib.Path(directory).glob("*.after_codegen.txt"))
        text = max(schedules, key=lambda file: file.stat().st_size).read_text() if schedules else ""
    return Compiled(memory, 0.0, read_work(text, target.chip, dict(mesh.shape)) if text else None)


def _memory(found: Any, is_tpu: bool) -> dict[str, float]:
    arguments, code = found.argument_size_in_bytes, found.generated_code_size_in_bytes
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    # libtpu 0.0.42 counts some buffers twice in temp_size, and holds its peak against the limit. The peak of the CPU's
    # compiler leaves temporaries out.
    temporary = found.peak_memory_in_bytes - arguments - outputs if is_tpu else found.temp_size_in_bytes
    sizes = {"arguments": arguments, "outputs": outputs, "activations": temporary, "code": code}
    return {kind: float(size) for kind, size in sizes.items()}


def _needed(message: str) -> float:
    """Bytes, from "... total memory required for HLO temporaries (38.75G) exceeds available HBM (15.75G)"."""
    found = re.search(r"required[^(]*\(([\d.]+)([KMG])\)", message)
    if not found:
        raise ValueError(f"an out-of-memory error of a form not seen before: {message}")
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30}[found[2]]
