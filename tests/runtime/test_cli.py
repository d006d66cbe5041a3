"""What people type and write into config files, and the one line that each command answers to what is wrong with it.

In one process, as far as a command goes before it imports jax; tests/e2e/test_main.py starts real ones.
"""

import ast
import re

import pytest
from typed import RIGHT, ROOT, read, refusal, start

from spin_jax import generate, main
from spin_jax.compile_check import __main__
from spin_jax.config import base_config, flatten

# ---- (the flag that is wrong, what the one line says of it): what it names, and then what to do

FLAGS = [
    ("--config.spin.bta=1", "--config.spin.bta is not a field", "did you mean --config.spin.beta?"),
    ("--config.beta=1", "--config.beta is not a field", "did you mean --config.spin.beta?"),
    ("--config.trian.epochs=1", "--config.trian.epochs is not a field", "did you mean --config.train.epochs"),
    ("--config.lr=1", "--config.lr is not a field", ""),
    ("--config.train=8", "--config.train is not a field", "it holds fields, such as --config.train.epochs"),
    ("--config.=1", "--config. is not a field", ""),
    ("--config.seed.x=1", "--config.seed.x is not a field", "did you mean --config.seed?"),
    ("--confg=configs/base.py", "--confg is not a flag", "did you mean --config?"),
    ("--confg.seed=1", "--confg.seed is not a flag", "did you mean --config.seed?"),
    ("--seed=1", "--seed is not a flag", "did you mean --config.seed?"),
    ("--iterations=2", "--iterations is not a flag", "did you mean --config.iterations?"),
    ("--lr 1", "--lr is not a flag", ""),
    ("config.seed=1", "'config.seed=1' is not a flag", "flags begin with --"),
    ("seed 1", "'seed' is not a flag", "flags begin with --"),
    ("--config.seed = 1", "'1' is not a flag", "have no spaces"),
    ("--config.seed", "--config.seed has no value", "as --config.seed=42"),
    ("--config.seed --config.iterations=1", "--config.seed has no value", "as --config.seed=42"),
    ("--config.seed=", '--config.seed="" must be a whole number', "write it as --config.seed=42"),
    ("--config.seed=one", "--config.seed=one must be a whole number", "write it as --config.seed=42"),
    ("--config.seed=1e3", "--config.seed=1000.0 must be a whole number", "write it as --config.seed=1000"),
    ("--config.seed=1.5", "--config.seed=1.5 must be a whole number", "write it as --config.seed=42"),
    ("--config.seed=True", "--config.seed=True must be a whole number", "write it as --config.seed=42"),
    ("--config.seed=(1,)", '--config.seed="(1,)" must be a whole number', "write it as --config.seed=42"),
    ("--config.seed=-1", "--config.seed=-1 must be at least 0", ""),
    ("--config.seed -1", "--config.seed=-1 must be at least 0", ""),
    ("--config.seed=2147483648", "--config.seed=2147483648 must be at most 2147483647", ""),
    ("--config.seed=4294967296", "--config.seed=4294967296 must be at most 2147483647", ""),
    ("--config.seed=9223372036854775808", "--config.seed=9223372036854775808 must be at most 2147483647", ""),
    (f"--config.seed={'9' * 5000}", '--config.seed="999', '..." must be a whole number'),
    ("--noconfig.seed", "--noconfig.seed switches nothing off", "write --config.seed=42"),
    ("--noconfig.train.epochs=1", "--noconfig.train.epochs=1 switches nothing off", "write --config.train.epochs=2.0"),
    ("--config.iterations=0", "--config.iterations=0 must be at least 1", ""),
    ("--config.iterations=999999999999", "--config.iterations=999999999999 must be at most 1000", ""),
    ("--config.train.epochs=two", "--config.train.epochs=two must be a number", "as --config.train.epochs=2.0"),
    ("--config.train.epochs=nan", "--config.train.epochs=nan must be a number", "as --config.train.epochs=2.0"),
    ("--config.train.epochs=-inf", "--config.train.epochs=-inf must be a number", "as --config.train.epochs=2.0"),
    ("--config.train.epochs=1e400", "--config.train.epochs=inf must be at most 10000", ""),
    ("--config.train.epochs=1e9", "--config.train.epochs=1000000000.0 must be at most 10000", ""),
    ("--config.train.epochs=True", "--config.train.epochs=True must be a number", "as --config.train.epochs=2.0"),
    (f"--config.train.epochs=1{'0' * 400}", '--config.train.epochs="1000', "must be at most 10000"),
    ("--config.train.epochs=0", "--config.train.epochs=0 must be above 0", ""),
    ("--config.train.learning_rate=5e7", '--config.train.learning_rate="(50000000.0,)" must be at most 1', ""),
    ("--config.train.learning_rate=1e-40", '--config.train.learning_rate="(1e-40,)" is so small', "at least 1e-30"),
    (
        "--config.train.learning_rate=()",
        '--config.train.learning_rate="()" is empty',
        'as --config.train.learning_rate="',
    ),
    ("--config.train.batch_size=2.5", "--config.train.batch_size=2.5 must be a whole number", "train.batch_size=64"),
    ("--config.train.batch_size=0", "--config.train.batch_size=0 must be at least 1", ""),
    ("--config.train.micro_batches=128", "--config.train.micro_batches=128 cannot cut", "lower it"),
    ("--config.train.row_length=64", "--config.train.length_multiple=128 is more than", "lower it"),
    ("--config.train.row_length=-1", "--config.train.row_length=-1 must be at least 0", ""),
    ("--config.train.warmup_ratio=1", "--config.train.warmup_ratio=1 must be below 1", ""),
    ("--config.train.warmup_ratio=10", "--config.train.warmup_ratio=10 must be at most 1", ""),
    ("--config.train.weight_decay=0.1", "--config.train.weight_decay=0.1 works with adamw only", "to 0"),
    ("--config.train.optimizer=adam", "--config.train.optimizer=adam is not one of", "did you mean adamw?"),
    ("--config.spin.beta=(0.1,-1.0)", '--config.spin.beta="(0.1, -1.0)" must be above 0', ""),
    ("--config.spin.beta=(0.1", '--config.spin.beta="(0.1" must be a tuple', 'write it as --config.spin.beta="(0.1,)"'),
    ("--config.spin.beta=high", "--config.spin.beta=high must be a tuple", 'write it as --config.spin.beta="(0.1,)"'),
    ("'--config.spin.beta=(\"0.1\",)'", "--config.spin.beta=", 'write it as --config.spin.beta="(0.1,)"'),
    ("--config.spin.beta=(True,)", '--config.spin.beta="(True,)" must be', 'write it as --config.spin.beta="(0.1,)"'),
    ("--config.spin.beta=({},)", "--config.spin.beta=", 'write it as --config.spin.beta="(0.1,)"'),
    (f"'--config.spin.beta={'(' * 999}'", "--config.spin.beta=", 'write it as --config.spin.beta="(0.1,)"'),
    ("--config.spin.loss=hings", "--config.spin.loss=hings is not one of logistic", "did you mean hinge?"),
    ("--config.spin.loss=", '--config.spin.loss="" is not one of logistic', "hinge"),
    ("--config.sft.control=maybe", "--config.sft.control=maybe must be True or False", "as --config.sft.control=False"),
    ("--config.sft.epochs=-1", "--config.sft.epochs=-1 must be at least 0", ""),
    ("--config.model.path=", "--config.model.path is empty", "as --config.model.path=PATH"),
    ("--config.model.path=toy:", '--config.model.path="toy:"', "must both be toy:, or neither"),
    ("--config.model.attention=fast", "--config.model.attention=fast is not one of auto, plain", "flash"),
    ("--config.data.train=", "--config.data.train is empty", "as --config.data.train=PATH"),
    ("--config.data.max_length=512", "--config.data.max_prompt_length=512 leaves no room", "lower the one"),
    ("--config.data.layout=sharegpt", "--config.data.layout=sharegpt is not one of", "conversations"),
    ("--config.generate.max_new_tokens=1000000000", "--config.generate.max_new_tokens=1000000000 must be at most", ""),
    ("--config.generate.min_new_tokens=300", "--config.generate.min_new_tokens=300 is more than", "lower it"),
    ("--config.generate.prompt_bucket=100000", "--config.generate.prompt_bucket=100000 pads", "lower it"),
    ("--config.generate.batch_size=-1", "--config.generate.batch_size=-1 must be at least 0", ""),
    ("--config.generate.top_p=1.5", "--config.generate.top_p=1.5 must be at most 1", ""),
    ("--config.generate.top_k=-1", "--config.generate.top_k=-1 must be at least 0", ""),
    ("--config.generate.temperature=-0.5", "--config.generate.temperature=-0.5 must be at least 0", ""),
    ("--config.generate.responses=1000", "--config.generate.responses=1000 must be at most 128", ""),
    ("--config.generate.stop_strings=###", '--config.generate.stop_strings="###" must be a tuple of texts', "('###',)"),
    (
        "--config.generate.stop_strings=(5,)",
        '--config.generate.stop_strings="(5,)" must be a tuple of texts',
        "('###',)",
    ),
    ("--config.lora.rank=99999", "--config.lora.rank=99999 must be at most 16384", ""),
    ("--config.mesh.data=0", "--config.mesh.data=0", "at least 1"),
    ("--config.mesh.data=-1", "--config.mesh.data=-1", "of data and fsdp one at most"),
    ("--config.mesh.decode_tensor=-2", "--config.mesh.decode_tensor=-2 must be at least 1", "or -1"),
    ("--flagfile=nowhere.flags", "nowhere.flags", ""),
]


@pytest.mark.parametrize(("words", "named", "advice"), FLAGS, ids=lambda value: value[:60])
@pytest.mark.parametrize("program", [main, generate, __main__], ids=lambda program: program.__name__)
def test_a_wrong_flag_is_one_line_in_every_command(program, words, named, advice):
    if (
        program is generate
        and ("data.train" in words or "toy:" in words)
        or program is __main__
        and "data.train" in words
    ):
        pytest.skip("not read by this command")
    message = refusal(program, f"{RIGHT[program]} {words}")
    assert named in message and advice in message.partition(named)[2]


@pytest.mark.parametrize(
    ("program", "line", "message"),
    [
        (
            main,
            "",
            "--config is missing: python -m spin_jax.main --config=configs/quickstart.py",
        ),
        (
            generate,
            "--config configs/zephyr_7b.py:v5e-16,code --out= '--config.spin.beta=(0.1, 5.0)' --prompts=p "
            "'--config.data.train=my \"own\" data' --config.data.split=",
            "--out is missing: python -m spin_jax.generate --config configs/zephyr_7b.py:v5e-16,code "
            """--config.spin.beta="(0.1, 5.0)" --prompts=p --config.data.train='my "own" data' """
            '--config.data.split="" --out=answers.jsonl',
        ),
        (
            main,
            "--workdir=w",
            "--config is missing: python -m spin_jax.main --workdir=w --config=configs/quickstart.py",
        ),
        (
            generate,
            "--prompts=p",
            "--config is missing: python -m spin_jax.generate --prompts=p --config=configs/base.py --out=answers.jsonl",
        ),
        (
            generate,
            "--config=configs/base.py --out=o",
            "--prompts is missing: python -m spin_jax.generate --config=configs/base.py --out=o "
            "--prompts=prompts.jsonl",
        ),
        (
            __main__,
            "",
            "--config is missing: python -m spin_jax.compile_check --config=configs/zephyr_7b.py:v5e-16",
        ),
        (
            __main__,
            "--config=configs/base.py",
            "--slice is missing: python -m spin_jax.compile_check --config=configs/base.py --slice=v5e-16",
        ),
    ],
)
def test_what_is_missing_is_shown_in_the_command_that_was_typed(program, line, message):
    assert refusal(program, line) == message


@pytest.mark.parametrize(
    ("program", "line", "named", "advice"),
    [
        (main, "--workdr=w", "--workdr is not a flag", "did you mean --workdir?"),
        (main, f"{RIGHT[main]} --stages=", "--stages= is not one of", "generate, score, train"),
        (main, f"{RIGHT[main]} --stages=generate,sample", "--stages=sample is not one of", "generate, score, train"),
        (main, f"{RIGHT[main]} --profile --stages=score", "--profile traces training steps", "add train to --stages"),
        (main, f"{RIGHT[main]} --profile=maybe", "--profile=maybe", "boolean"),
        (main, f"{RIGHT[main]} --num_processes=two", "--num_processes=two", ""),
        (main, f"{RIGHT[main]} --num_processes=2", "--num_processes and --process_id need", "--coordinator=HOST:PORT"),
        (
            main,
            f"{RIGHT[main]} --coordinator=h:1 --num_processes=2 --process_id=2",
            "--coordinator=h:1",
            "from 0 to N - 1",
        ),
        (
            main,
            f"{RIGHT[main]} --coordinator=h --num_processes=2 --process_id=0",
            "--coordinator=h",
            "--coordinator=HOST:PORT",
        ),
        (
            main,
            "--config=configs/zephyr_7b.py:v5e-8 --workdir=w --check_for=16",
            "--config.mesh.fsdp=8",
            "--config.mesh.fsdp=16",
        ),
        (main, "--config=configs/zephyr_7b.py --workdir=", "--workdir= is empty", "leave the flag out"),
        (main, f"{RIGHT[main]} --check_for=65", "--config.train.batch_size=64", "--config.train.batch_size=65"),
        (generate, "--config=configs/base.py --prompt=p", "--prompt is not a flag", "did you mean --prompts?"),
        (
            generate,
            "--config=configs/quickstart.py --prompts=p --out=o",
            '--config.model.path="toy:"',
            "WORKDIR/iteration_0",
        ),
        (
            __main__,
            "--config=configs/zephyr_7b.py:v5e-16 --slice=v5e-8",
            "--slice=v5e-8 is not the slice of",
            "leave it",
        ),
        (__main__, "--config=configs/base.py --slice=v9", "'v9' is not a slice", "v5e-16"),
        (__main__, f"{RIGHT[__main__]} --layers=-1", "--layers=-1", "non-negative"),
    ],
)
def test_a_wrong_flag_of_one_command_is_one_line(program, line, named, advice):
    message = refusal(program, line)
    assert named in message and advice in message.partition(named)[2]


# ---- what may be typed


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--config.spin.beta=(0.1,) --config.spin.beta=(1.0,)", "spin.beta", (1.0,)),
        ("--config.seed=1 --config.seed=2", "seed", 2),
        (
            "--config.generate.stop_strings=\"('a',)\" --config.generate.stop_strings=\"('b',)\"",
            "generate.stop_strings",
            ("b",),
        ),
        ("--config.train.learning_rate=1e-6,2e-6 --config.train.learning_rate=3e-6", "train.learning_rate", (3e-6,)),
        ("--config.spin.beta=0.1", "spin.beta", (0.1,)),
        ("--config.spin.beta=0.1,0.5", "spin.beta", (0.1, 0.5)),
        ("'--config.spin.beta=[0.1, 0.5]'", "spin.beta", (0.1, 0.5)),
        ("'--config.spin.beta= (0.1, 5) '", "spin.beta", (0.1, 5)),
        ("--config.spin.beta '(0.1, 5)'", "spin.beta", (0.1, 5)),
        ("-config.seed=3", "seed", 3),
        ("--config.seed 3", "seed", 3),
        ("--config.seed=1_000", "seed", 1000),
        ("--config.train.epochs=1", "train.epochs", 1.0),
        ("--config.train.epochs=1e0", "train.epochs", 1.0),
        ("--config.sft.epochs=1", "sft.epochs", 1.0),
        ("--config.sft.control", "sft.control", True),
        ("--config.sft.control=true", "sft.control", True),
        ("--config.sft.control=1", "sft.control", True),
        ("--config.sft.control --noconfig.sft.control", "sft.control", False),
        ("--config.sft.control=False", "sft.control", False),
        ("--config.data.split=a=b", "data.split", "a=b"),
        ("--config.data.split=", "data.split", ""),
        ("--config.data.split=3", "data.split", "3"),
        ("'--config.data.train=two words'", "data.train", "two words"),
    ],
)
def test_what_is_typed_is_what_a_field_gets(words, field, value):
    got = read(words)[field]
    assert got == value and type(got) is type(value)


def test_several_answers_to_a_prompt_need_a_model_that_writes_them():
    """A run that takes the data's responses cannot have more; sampling alone can, with the same config."""
    words = "--config=configs/smollm2_135m_dpo.py --config.generate.responses=4 --config.model.path=m"
    refused = refusal(main, f"{words} --workdir=w --config.data.train=d --check_for=0")
    assert refused.startswith("--config.generate.responses=4 has no effect with --config.generate.source=data")
    assert start(generate, f"{words} --prompts=p --out=o").generate.responses == 4


def test_flags_may_come_from_a_file(tmp_path):
    (tmp_path / "my.flags").write_text("--config.seed=7\n--config.spin.beta=(5.0,)\n")
    fields = read(f"--flagfile={tmp_path / 'my.flags'} --config.seed=8")
    assert (fields["seed"], fields["spin.beta"]) == (8, (5.0,))


def test_every_message_names_a_field_as_its_flag():
    """In all texts of the package but docstrings; a message that is put together elsewhere is a text, too."""
    fields = "|".join(re.escape(field) for field in flatten(base_config()))
    wrong = []
    for path in sorted((ROOT / "spin_jax").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                wrong += [
                    f"{path.name}:{node.lineno}: {found[0]}"
                    for found in re.finditer(rf"(?<!--)\bconfig\.({fields})\b", node.value)
                ]
    assert not wrong, "\n".join(wrong)
