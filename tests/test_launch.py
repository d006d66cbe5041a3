"""The launch scripts: what they would ask of Google's cloud, and what they do when it answers.

No cloud can be had in a test. `--dry-run` shows the commands; tests/cloud/gcloud answers as the real one would, and
runs what is sent to a worker, so that launch/worker.sh, the shells in between and their quoting are real.
"""

import math
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from spin_jax import config as config_lib
from spin_jax.devices.accelerators import use_slice

ROOT = pathlib.Path(__file__).resolve().parent.parent
TPU = ROOT / "launch" / "tpu.sh"
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "tests/cloud").iterdir()), ROOT / ".ci/run"]
WHERE = ("--name=zephyr", "--zone=us-west4-a", "--project=my-project")
REPO = "--repo=https://github.com/me/spin_jax"
RUN = ("--config=configs/zephyr_7b.py:v5e-16", "--workdir=gs://my-bucket/runs/zephyr")
# What shells like least: parentheses, spaces, quotes of both kinds, a dollar, nothing at all.
FLAGS = ("--config.spin.beta=(0.1, 5.0)", """--config.data.train=it's "my" $HOME""", "--config.data.split=")


@pytest.fixture(autouse=True)
def cloud(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cloud, for every test: no call can reach a real one."""
    monkeypatch.setenv("PATH", f"{ROOT / 'tests/cloud'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CLOUD", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def python(tmp_path_factory) -> pathlib.Path:
    """The Python of these tests, as the first python3; a link would not find what is installed beside it."""
    python = tmp_path_factory.mktemp("bin") / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(python.parent), prepend=os.pathsep)
        yield python


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([TPU, *arguments], capture_output=True, text=True, timeout=60)


def rehearsed(command: str, *options: str) -> list[list[str]]:
    """The words of each command that --dry-run prints, with --flag=value as it stands."""
    ran = launch(command, *WHERE, "--dry-run", *options)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    for line in lines:
        subprocess.run(["bash", "-n"], input=line, text=True, check=True)
    words = [shlex.split(line) for line in lines]
    assert all(set(WHERE[1:]) <= set(line) and line[0] == "gcloud" for line in words)
    return words


def sent(words: list[str]) -> str:
    """What a gcloud ssh command runs over there."""
    (command,) = [word for word in words if word.startswith("--command=")]
    return command.removeprefix("--command=")


def test_shellcheck():
    directories = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join(directories))
    ran = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (("--slice=v5p-8",), {"--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5", "--node-id=zephyr"}),
        (
            ("--slice=v5e-16", "--spot"),
            {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=zephyr", "--spot"},
        ),
        (
            ("--slice=v6e-16", "--slices=2", "--runtime=other", "--create-flag=--network=a b"),
            {"--accelerator-type=v6e-16", "--runtime-version=other", "--node-count=2", "--network=a b"},
        ),
    ],
    ids=["single machine", "pod slice", "two slices"],
)
def test_create(options, asked):
    (words,) = rehearsed("create", *options)
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "zephyr"]
    assert asked <= set(words)
    assert ("--spot" in words) == ("--spot" in options)
    assert any(word.startswith("--node-id") for word in words) != any(word.startswith("--node-count") for word in words)


@pytest.mark.parametrize("slice_name", ["v2-8", "v3-32", "v4-8", "v5e-1", "v5litepod-4", "v5p-16", "v6e-64"])
def test_every_generation_can_be_asked_for(slice_name):
    (words,) = rehearsed("create", f"--slice={slice_name}")
    kind, _, size = slice_name.partition("-")
    assert f"--accelerator-type={'v5litepod' if kind == 'v5e' else kind}-{size}" in words


def test_everything_but_create_and_logs_is_for_all_workers():
    commands = {
        "setup": (REPO, "--ref=v1"),
        "start": RUN,
        "stop": (),
    }
    for command, options in commands.items():
        (words,) = rehearsed(command, *options)
        assert words[3:6] == ["queued-resources", "ssh", "zephyr"]
        assert {"--node=all", "--worker=all"} <= set(words)
    assert "fetch --quiet --depth=1 https://github.com/me/spin_jax v1 &&" in sent(
        rehearsed("setup", *commands["setup"])[0]
    )
    (words,) = rehearsed("logs", "--worker=3")
    assert {"--node=0", "--worker=3"} <= set(words)
    assert [line[3:5] for line in rehearsed("status")] == [
        ["queued-resources", "list"],
        ["tpu-vm", "list"],
        ["queued-resources", "ssh"],
    ]
    (words,) = rehearsed("delete")
    assert {"--force", "--quiet"} <= set(words)  # the machines as well, and no question


def test_flags_arrive_as_they_were_given():
    (words,) = rehearsed("start", *RUN, "--hf-secret=hf-token", "--", *FLAGS)
    over_there = shlex.split(sent(words))
    assert over_there == ["HF_SECRET=hf-token", "spin_jax/launch/worker.sh", "start", *RUN, *FLAGS]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "is not a command"),
        (("begin",), "'begin' is not a command"),
        (("create", *WHERE), "create needs --slice=..."),
        (("create", *WHERE[1:], "--slice=v5e-16"), "create needs --name=..."),
        (("setup", *WHERE), "setup needs --repo=..."),
        (("start", *WHERE, RUN[0]), "start needs --workdir=..."),
        (("supervise", *WHERE, *RUN, REPO), "supervise needs --slice=..."),
        (("create", *WHERE, "--slice=h100-8"), "--slice=h100-8 is not a TPU slice"),
        (("create", *WHERE, "--slice=v5e-many"), "--slice=v5e-many is not a TPU slice"),
        (("create", *WHERE, "--slice=v5e-16", "--slices=two"), "--slices=two: write a number"),
        (("create", *WHERE, "--slice", "v5e-16"), "'--slice' is not an option"),
        (("delete", "--name=a b", *WHERE[1:]), "--name=a b: write"),
        (("delete", *WHERE, "--", "--config.seed=1"), "delete takes no flags"),
        (("start", *WHERE, RUN[0], "--workdir=runs/zephyr"), "write gs://BUCKET/PATH"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, cloud):
    ran = launch(*arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert told in ran.stderr and ran.stderr.count("\n") == 1
    assert not (cloud / "calls").exists()


@pytest.mark.parametrize(
    ("slice_name", "config", "flags", "told"),
    [
        ("v5e-16", "zephyr_7b.py:v4-32", (), "write --config=configs/zephyr_7b.py:v5e-16"),
        (
            "v5e-16",
            "zephyr_7b.py:h100-8,code",
            (),
            "--slice=v5e-16 is not the slice of --config=configs/zephyr_7b.py:h10",
        ),
        ("v5e-16", "zephyr_7b.py:code", ("--config.mesh.fsdp=3",), "--config.mesh.fsdp=3 --config.mesh.tensor="),
        ("tpu7x-8", "zephyr_7b.py", (), "--slice=tpu7x-8 is to be had through GKE alone"),
        ("v4-16", "zephyr_7b.py", ("--config.seed=x",), "--config.seed=x must be a whole number"),
        ("v5e-8", "base.py", (), "--config.model.path is empty"),
        ("v5e-256", "smollm2_135m.py", ("--config.data.train=d", "--config.mesh.tensor=1"), "=16 pairs do not fill"),
        ("v5e-16", "zefyr_7b.py:v5e-16", (), "no such file; write a file, as --config=configs/zephyr_7b.py"),
        ("v5e-16", "smollm2_135m.py:v5e-16", (), "its get_config() takes no argument"),
    ],
)
@pytest.mark.parametrize("dry_run", [("--dry-run",), ()], ids=["dry run", "run"])
def test_what_the_run_would_refuse_costs_nothing(slice_name, config, flags, told, dry_run, cloud):
    chosen = (f"--slice={slice_name}", REPO, f"--config=configs/{config}", RUN[1], *dry_run)
    ran = launch("supervise", *WHERE, *chosen, "--", *flags)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert told in ran.stderr and ran.stderr.count("\n") == 1
    assert not (cloud / "calls").exists()


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (("--slice=v4-64", "--config=configs/zephyr_7b.py"), ()),
        (("--slice=v3-8", "--config=configs/zephyr_7b.py:code"), ()),
        (
            ("--slice=v5e-8", "--config=configs/smollm2_135m.py"),
            ("--config.data.train=d",),
        ),  # which takes all there are
        (("--slice=v5e-16", "--slices=2", RUN[0]), ("--config.mesh.data=2",)),
    ],
)
def test_a_config_without_a_slice_that_fits_is_taken(options, flags):
    assert rehearsed("supervise", REPO, RUN[1], *options, "--", *flags)


def test_without_python_a_launch_says_that_it_checked_less(tmp_path, monkeypatch):
    """The slices are compared in any case."""
    for name in ("dirname", "bash", "uname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    options = (*WHERE, REPO, RUN[1], "--slice=v5e-16", "--dry-run")
    ran = launch("supervise", *options, RUN[0], "--", "--config.seed=x")
    assert ran.returncode == 0 and "no Python with spin_jax here" in ran.stderr
    assert launch("supervise", *options, "--config=configs/zephyr_7b.py:v4-32").returncode == 2


def test_help_names_every_option():
    text = launch("--help").stdout
    for words in (WHERE, RUN, (REPO, "--slice=", "--slices=", "--spot", "--runtime=", "--keep", "--dry-run")):
        assert all(word.partition("=")[0] in text for word in words)


@pytest.fixture
def supervise(cloud):
    """Supervises a run on a cloud of two workers until that ends.

    The checkout that the workers fetch has the real launch/worker.sh, and as Python what the test says.
    """
    checkout = cloud / "checkout"
    for part in ("launch", "configs"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))

    def run(python: pathlib.Path, *options: str) -> subprocess.CompletedProcess:
        if not (checkout / ".git").exists():
            check_in(python)
        return launch("supervise", *WHERE, *RUN, "--slice=v5e-16", f"--repo={checkout}", "--every=0.1", *options)

    def check_in(python: pathlib.Path) -> None:
        (checkout / ".venv/bin").mkdir(parents=True)
        (checkout / ".venv/bin/python").symlink_to(python)
        git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.com"]
        for words in (
            ["init", "--quiet", "--initial-branch=main"],
            ["add", "--all"],
            ["commit", "--quiet", "-m", "all"],
        ):
            subprocess.run([*git, *words], cwd=checkout, check=True)

    return run


def calls(directory: pathlib.Path, verb: str) -> int:
    return sum(shlex.split(line)[3] == verb for line in (directory / "calls").read_text().splitlines())


@pytest.mark.parametrize(
    ("plan", "status", "created", "started"),
    [
        ("0", 0, 1, 1),
        ("75 0", 0, 1, 2),
        ("preempted 75 lost 1 0", 0, 3, 5),
        ("2", 2, 1, 1),
        ("1 1 134 1 0", 1, 1, 4),
    ],
    ids=["done", "stopped with everything saved", "preempted", "a mistake", "crashes again and again"],
)
def test_supervise(supervise, cloud, plan, status, created, started):
    """It asks for machines and starts until the run has ended, however that is, and never leaves a machine behind."""
    (cloud / "plan").write_text(plan + "\n")
    (cloud / "unplugged").touch()  # once, nobody answers; that loses nothing
    ran = supervise(ROOT / "tests/cloud/program", "--", *FLAGS)
    assert ran.returncode == status, ran.stderr
    assert "unreachable" in ran.stderr
    assert calls(cloud, "create") == calls(cloud, "delete") == created
    assert not (cloud / "request").exists()
    for worker in ("home-0", "home-1"):
        assert int((cloud / f"starts-{worker}").read_text()) == started
        assert (cloud / f"arguments-{worker}").read_text() == "\n".join(["-m", "spin_jax.main", *RUN, *FLAGS, ""])


def test_what_an_earlier_run_left_is_no_end(supervise, cloud):
    """After a mistake was mended, on machines that were kept, the same command starts."""
    (cloud / "plan").write_text("2 0\n")
    assert supervise(ROOT / "tests/cloud/program", "--keep").returncode == 2
    assert supervise(ROOT / "tests/cloud/program").returncode == 0
    assert calls(cloud, "create") == calls(cloud, "delete") == 1


def test_a_mistake_of_the_real_program_is_shown(supervise, cloud, monkeypatch):
    """Through gcloud's place, two shells and launch/worker.sh, to spin_jax.main and its one line, and back."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    python = cloud / "python"  # of another commit, say, so that its mistake is not seen before
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" "--config.spin.beta=(-1.0, 2.0)"\n')
    python.chmod(0o755)
    ran = supervise(python, "--keep")
    assert ran.returncode == 2, ran.stderr
    assert 'spin_jax: --config.spin.beta="(-1.0, 2.0)" must be above 0' in ran.stdout
    assert "launch/tpu.sh delete --name=zephyr" in ran.stderr  # as they were kept


def test_a_worker_stops_when_it_is_asked_to(cloud):
    """One run at a time; SIGTERM reaches the program; the token reaches it, too, and nothing that is written down."""
    worker = cloud / "spin_jax/launch/worker.sh"
    for part in (worker.parent, cloud / "spin_jax/.venv/bin"):
        part.mkdir(parents=True)
    shutil.copy(ROOT / "launch/worker.sh", worker)
    (cloud / "spin_jax/.venv/bin/python").symlink_to(ROOT / "tests/cloud/program")
    (cloud / "plan").write_text("until-stopped\n")
    environment = {**os.environ, "HOME": str(cloud), "HF_SECRET": "hf-token"}

    def call(verb: str) -> tuple[int, list[str]]:
        ran = subprocess.run([worker, verb], env=environment, capture_output=True, text=True, timeout=60)
        return ran.returncode, ran.stdout.split()[1:]

    assert call("status") == (0, ["none"])
    assert call("start")[0] == 0
    assert call("start")[0] == 2
    while not (cloud / "token").exists():
        time.sleep(0.01)
    assert call("status") == (0, ["running"])
    assert call("stop")[0] == 0
    while call("status") == (0, ["running"]):
        time.sleep(0.01)
    assert call("status") == (0, ["exit", "75"])
    assert (cloud / "token").read_text() == "token: the-token\n"
    written = [path for path in cloud.rglob("*") if path.is_file() and path.name != "token"]
    assert "the-token" not in "".join(path.read_text() for path in written)


def test_the_jobset_fits_its_slice():
    """Hosts times chips are the slice that the config names; the statuses are the program's."""
    document = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (config_flag,) = [word for word in container["command"] if word.startswith("--config=")]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"]
    assert spec["parallelism"] * chips * job["replicas"] == devices(config_flag.rpartition(":")[2])
    topology = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == spec["parallelism"] * chips
    assert [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"]] == [[2]]


def test_sky_asks_for_the_slice_of_its_config():
    document = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
    (words,) = rehearsed("create", f"--slice={document['envs']['CONFIG'].rpartition(':')[2]}")
    resources = document["resources"]
    assert f"--accelerator-type={resources['accelerators'].removeprefix('tpu-')}" in words
    assert f"--runtime-version={resources['accelerator_args']['runtime_version']}" in words
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75]


def devices(slice_name: str) -> int:
    config = config_lib.base_config()
    use_slice(config, slice_name)
    return config.mesh.data * config.mesh.fsdp * config.mesh.tensor
