"""Config files as people write and name them, and the one line that each command answers to what is wrong with one."""

import pytest
from typed import RIGHT, read, refusal

from spin_jax import generate, main
from spin_jax.compile_check import __main__
from spin_jax.errors import quoted

BASE = "from spin_jax.config import base_config; BASE = base_config(); get_config = lambda: BASE\n"

CONFIG_FILES = [
    ("", "has no get_config()", "write one that returns spin_jax.config.base_config()"),
    ("get_config = 5", "has no get_config()", "write one that returns"),
    (
        "def get_config():\n    pass",
        "get_config() returns None",
        "let it return the config of spin_jax.config.base_config()",
    ),
    ("def get_config():\n    return {'seed': 1}", "get_config() returns a dict", "let it return the config of"),
    ("def get_config(size):\n    return size", "its get_config() takes an argument", ".py:ARGUMENT"),
    ("def get_config(:", "its line 1 raises SyntaxError (invalid syntax", "mend the file"),
    (
        "\nimport no_such_package",
        "its line 2 raises ModuleNotFoundError (No module named 'no_such_package')",
        "mend the",
    ),
    ("\n\n1 / 0", "its line 3 raises ZeroDivisionError (division by zero)", "mend the file"),
    ("import sys; sys.exit('no')", "its line 1 raises SystemExit (no)", "mend the file"),
    ("name: yaml\nseed: 1", "its line 1 raises NameError (name 'yaml' is not defined)", "mend the file"),
    ("x = '\xe9'", "raises SyntaxError", "mend the file"),
    ("\0", "null bytes", "mend the file"),
    ("BASE.spin.beta = 0.1", "its line 2 raises TypeError (Could not override field 'beta'", "mend the file"),
    (
        "BASE.train.batch_size = 'x'",
        "its line 2 raises TypeError (Could not override field 'batch_size'",
        "mend the file",
    ),
    ("BASE.train.learning_rat = (1e-6,)", "AttributeError", 'Did you mean "learning_rate" instead of "learning_rat"?'),
    (
        "BASE.unlock().train.learning_rat = (1e-6,)",
        "--config.train.learning_rat is not a field",
        "--config.train.learning_rate?",
    ),
    (
        "BASE.unlock().__delattr__('spin')",
        "--config.spin.loss is missing",
        "start the config from spin_jax.config.base_config()",
    ),
    ("BASE.seed = 2**63", "--config.seed=9223372036854775808 must be at most 2147483647", ""),
    (
        "BASE.train.learning_rate = ('1e-6',)",
        "--config.train.learning_rate=",
        "write it as --config.train.learning_rate=",
    ),
    ("BASE.mesh.data = 0", "--config.mesh.data=0", "at least 1"),
]


@pytest.mark.parametrize(("text", "named", "advice"), CONFIG_FILES, ids=lambda value: value[:60])
@pytest.mark.parametrize("program", [main, generate, __main__], ids=lambda program: program.__name__)
def test_a_config_file_that_is_none_is_one_line(program, text, named, advice, tmp_path):
    file = tmp_path / "my.py"
    if text.startswith("BASE"):
        text = BASE + text
    file.write_bytes(text.encode("latin-1"))
    message = refusal(program, f"{RIGHT[program]} --config={file}")
    assert named in message and advice in message.partition(named)[2]
    assert f"--config={file}: " in message or message.startswith("--config.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("configs/nowhere.py", "no such file; write a file, as --config=configs/base.py"),
        ("configs/zefyr_7b.py", "no such file; write a file, as --config=configs/zephyr_7b.py"),
        ("zephyr_7b", "no such file; write a file, as --config=configs/zephyr_7b.py"),
        ("spin.beta=0.1", "no such file; did you mean --config.spin.beta=0.1?"),
        ("configs", "is a directory; write a file, as --config=configs/base.py"),
        ("configs/zephyr_7b.py:v9-7", "'v9-7' is not a slice: write a TPU's type, as v5e-16"),
        ("configs/zephyr_7b.py:v5e-17", "'v5e-17' is not a slice: near to it are v5e-8, v5e-16, v5e-32"),
        ("configs/zephyr_7b.py:v5e-16,cod", "'cod' is not a slice: write a TPU's type, as v5e-16"),
        (
            "configs/smollm2_135m.py:v5e-8",
            "its get_config() takes no argument: write --config=configs/smollm2_135m.py (the compile check is told the "
            "slice by --slice)",
        ),
        ("configs/base.py:fast", "its get_config() takes no argument: write --config=configs/base.py"),
    ],
)
def test_a_config_that_is_not_there_is_one_line(name, message):
    refused = refusal(main, f"--config={name} --workdir=w --config.model.path=m --config.data.train=d")
    assert refused.startswith(f"--config={quoted(name)}: {message}")


def test_a_config_that_was_changed_within_its_second_is_read_anew(tmp_path):
    """Bytecode of the same size and time is not taken for it."""
    file = tmp_path / "my.py"
    for seed in (1, 2):
        file.write_text(f"{BASE}BASE.seed = {seed}")
        assert read(f"--config={file}")["seed"] == seed
