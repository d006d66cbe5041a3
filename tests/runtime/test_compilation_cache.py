"""Where compiled programs are kept."""

import logging

import jax
import pytest
from etils import epath

from spin_jax.runtime import compilation_cache

_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture(autouse=True)
def nowhere_yet(monkeypatch, tmp_path):
    """A user without a cache, and jax without a place for one."""
    before = {name: getattr(jax.config, name) for name in _SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_all_runs_of_a_user_share_one_bounded_place(tmp_path):
    compilation_cache.keep(epath.Path(tmp_path / "runs" / "one"))
    place = tmp_path / "cache" / "spin_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(place) and place.is_dir()
    assert jax.config.jax_compilation_cache_max_size == 4 * 2**30


def test_what_a_kill_has_torn_is_forgotten(tmp_path):
    place = tmp_path / "cache" / "spin_jax" / "compiled"
    place.mkdir(parents=True)
    for name in ("jit_step-1-cache", "jit_step-1-atime", "jit_step-2-cache"):
        (place / name).touch()
    compilation_cache.keep()
    assert sorted(path.name for path in place.iterdir()) == [".lockfile", "jit_step-1-atime", "jit_step-1-cache"]


@pytest.mark.parametrize(
    ("workdir", "place"),
    [("gs://bucket/runs/one", "gs://bucket/runs/compiled"), ("gs://bucket", "gs://bucket/compiled")],
)
def test_programs_of_a_run_in_a_bucket_are_beside_it(workdir, place):
    compilation_cache.keep(epath.Path(workdir))
    assert jax.config.jax_compilation_cache_dir == place
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"


def test_the_users_own_place_is_left_alone(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    compilation_cache.keep(epath.Path(tmp_path / "run"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()


def test_a_place_that_cannot_be_written_is_warned_of(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where a directory should be")
    with caplog.at_level(logging.WARNING):
        compilation_cache.keep()
    assert jax.config.jax_compilation_cache_dir is None
    assert "compiled programs are not kept; set JAX_COMPILATION_CACHE_DIR" in caplog.text
