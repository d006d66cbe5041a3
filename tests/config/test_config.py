import pathlib
import subprocess
import sys

import pytest

from spin_jax.config import at_iteration, base_config, flatten, freeze, override
from spin_jax.config.__main__ import listing
from spin_jax.config.schema import FIELDS
from spin_jax.errors import UserError, as_flag
from spin_jax.generation.sampling import MAX_RESPONSES
from spin_jax.runtime.cli import load_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TOY = {"model.path": "toy:", "data.train": "toy:"}


def make_config(changes):
    """A config that is valid but for `changes`, as files and Python make it: nothing is read from text."""
    config = base_config()
    override(config, {"model.path": "a/model", "data.train": "a/data"} | changes)
    return config


def refusal(changes) -> str:
    with pytest.raises(UserError) as refused:
        freeze(make_config(changes))
    message = str(refused.value)
    assert "\n" not in message
    return message


# ---- the shipped files


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.name)
def test_every_shipped_config_is_valid(file):
    config = load_config(str(file))
    assert set(flatten(config)) == set(flatten(base_config()))
    config.model.path = config.model.path or "a/model"  # what some leave to the command line
    config.data.train = config.data.train or "a/data"
    freeze(config)


def test_freezing_imports_no_jax():
    code = (
        "import sys; from spin_jax.config import base_config, freeze; c = base_config(); c.model.path = 'm';"
        "c.data.train = 'd'; freeze(c); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent).returncode == 0


# ---- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.path": ""}, "--config.model.path is empty: name one, as --config.model.path=PATH"),
        ({"data.train": ""}, "--config.data.train is empty"),
        ({"model.path": "toy:"}, '--config.model.path="toy:" and --config.data.train=a/data must both be toy:'),
        (TOY, "--config.sft.epochs=0 leaves the toy model untrained: write --config.sft.epochs=5"),
        (TOY | {"sft.epochs": 1.0, "lora.rank": 8}, "--config.lora.rank=8 cannot train the toy model"),
        (
            {"data.max_length": 512},
            "--config.data.max_prompt_length=512 leaves no room for a response in --config.data.max_length=512",
        ),
        ({"generate.stop_strings": ("",)}, """--config.generate.stop_strings="('',)" has an empty text"""),
        (
            {"generate.source": "data", "generate.responses": 2},
            "--config.generate.responses=2 has no effect with --config.generate.source=data, which takes",
        ),
        ({"generate.min_new_tokens": 257}, "--config.generate.min_new_tokens=257 is more than --config.generate.max_n"),
        ({"generate.prompt_bucket": 2048}, "--config.generate.prompt_bucket=2048 pads every prompt to so many tokens"),
        ({"lora.target_modules": ()}, "--config.lora.target_modules=() updates nothing: name linear layers, as"),
        (
            {"lora.target_modules": ("q_proj", "lm_head")},
            """--config.lora.target_modules="('q_proj', 'lm_head')" is not one of q_proj, k_proj, v_proj""",
        ),
        ({"train.warmup_ratio": 1.0}, "--config.train.warmup_ratio=1 must be below 1"),
        (
            {"train.micro_batches": 65},
            "--config.train.micro_batches=65 cannot cut --config.train.batch_size=64 pairs into so many parts",
        ),
        (
            {"train.length_multiple": 2048, "train.row_length": 1024},
            "--config.train.length_multiple=2048 is more than --config.train.row_length=1024",
        ),
        ({"mesh.fsdp": 0}, "--config.mesh.data=1 --config.mesh.fsdp=0 --config.mesh.tensor=-1: each is a number of"),
        ({"mesh.data": -1}, "--config.mesh.data=-1 --config.mesh.fsdp=-1 --config.mesh.tensor=-1: each is a number"),
        ({"mesh.decode_tensor": 0}, "--config.mesh.decode_tensor=0 must be at least 1, or -1"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    assert refusal(changes).startswith(message)


@pytest.mark.parametrize(
    "changes, optimizer",
    [
        ({}, "train.optimizer"),  # SFT is not run
        ({"sft.epochs": 1.0}, "train.optimizer"),
        ({"train.optimizer": "adamw"}, None),
        ({"train.optimizer": "adamw", "sft.optimizer": "rmsprop"}, None),
        ({"train.optimizer": "adamw", "sft.optimizer": "rmsprop", "sft.epochs": 1.0}, "sft.optimizer"),
        ({"train.optimizer": "adamw", "sft.optimizer": "rmsprop", "sft.control": True}, "sft.optimizer"),
    ],
)
def test_weight_decay_is_for_every_optimizer_that_runs(changes, optimizer):
    changes = {"train.weight_decay": 0.1} | changes
    if optimizer:
        expected = f"--config.train.weight_decay=0.1 works with adamw only, not with --config.{optimizer}=rmsprop"
        assert refusal(changes).startswith(expected)
    else:
        freeze(make_config(changes))


@pytest.mark.parametrize("field", [name for name, field in FIELDS.items() if field.bounds])
def test_numbers_have_bounds(field):
    """Of every kind of number that cannot be meant, a refusal that names field and bound."""
    lowest, highest, inclusive = FIELDS[field].bounds
    default = flatten(base_config())[field]
    below, above = f"{'at least' if inclusive else 'above'} {lowest}", f"at most {highest}"
    one_below = lowest - 1 if inclusive else lowest
    numbers = [(one_below, below), (10**400, above)]
    if not isinstance(default, int):
        numbers += [
            (float("nan"), below),
            (-float("inf"), below),
            (float("inf"), above),
            (1e-40, "float32 cannot"),
        ]
    for number, bound in numbers:
        message = refusal({field: number})
        assert message.startswith(f"--config.{field}=") and bound in message
    if isinstance(default, tuple):
        assert refusal({field: ()}).startswith(f'--config.{field}="()" is empty: write one value an iteration, as --co')
        assert refusal({field: (*default, one_below)}).endswith(below)


def test_responses_have_the_number_of_what_can_be_addressed():
    assert FIELDS["generate.responses"].bounds.highest == MAX_RESPONSES


@pytest.mark.parametrize("field", [name for name, field in FIELDS.items() if field.choices])
def test_a_word_that_is_no_choice_is_refused_with_the_choices(field):
    default, words = FIELDS[field].default, FIELDS[field].words()
    value = ("zzz",) if isinstance(default, tuple) else "zzz"
    assert refusal({field: value}) == f"{as_flag(field, value)} is not one of {', '.join(words)}"
    assert set(default if isinstance(default, tuple) else [default]) <= set(words)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_says_what_it_is_and_may_have_its_default(name):
    field = FIELDS[name]
    field.check(name, field.default)
    assert field.doc.endswith(".") and not field.doc.startswith(" ") and "  " not in field.doc
    assert f"--config.{name}=" in listing() and field.doc.split()[0] in listing()
    # Every number has a bound; of the mesh's, -1 is the devices', and `freeze` knows what goes together.
    numbers = field.default if isinstance(field.default, tuple) else (field.default,)
    if any(type(number) in (int, float) for number in numbers) and not name.startswith("mesh."):
        assert field.bounds


def test_a_word_that_is_nearly_a_choice_is_told_it():
    assert refusal({"spin.loss": "hings"}).endswith("ssd: did you mean hinge?")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("iterations", 2.5, "--config.iterations=2.5 must be a whole number: write it as --config.iterations=4"),
        ("iterations", 2.0, "--config.iterations=2.0 must be a whole number: write it as --config.iterations=2"),
        ("seed", True, "--config.seed=True must be a whole number: write it as --config.seed=42"),
        ("train.epochs", True, "--config.train.epochs=True must be a number: write it as --config.train.epochs=2.0"),
        ("sft.epochs", "2", "--config.sft.epochs=2 must be a number, not text: write it as --config.sft.epochs=0.0"),
        (
            "spin.beta",
            (0.1, "1"),
            """--config.spin.beta="(0.1, '1')" must be a tuple of numbers: write it as --config.spin.beta="(0.1,)\"""",
        ),
        (
            "generate.stop_strings",
            "###",
            '--config.generate.stop_strings="###" must be a tuple of texts, not text: write it as '
            """--config.generate.stop_strings="('###',)\"""",
        ),
        ("sft.control", 1, "--config.sft.control=1 must be True or False: write it as --config.sft.control=False"),
        ("data.train", None, '--config.data.train=None must be text: write it as --config.data.train=""'),
        ("train", 1, "--config.train is not a field: it holds fields, such as --config.train.epochs"),
    ],
)
def test_a_value_of_another_kind_is_refused(field, value, message):
    assert refusal({field: value}) == message


@pytest.mark.parametrize(
    "field, advice",
    [
        ("train.learning_rat", ": did you mean --config.train.learning_rate?"),
        ("train.beta", ": did you mean --config.spin.beta?"),
        ("sft.batch_size", ": did you mean --config.train.batch_size or --config.generate.batch_size?"),
        ("spin.betas.x", ": did you mean --config.spin.beta?"),
        ("zzz", ""),
    ],
)
def test_an_unknown_field_is_refused_with_those_that_may_be_meant(field, advice):
    assert refusal({field: 1}) == f"--config.{field} is not a field{advice}"


def test_an_unknown_field_of_a_file_is_refused():
    config = make_config({}).unlock()
    config.train.learning_rat = (1e-6,)
    with pytest.raises(UserError, match="--config.train.learning_rat is not a field: did you mean --config.train.lear"):
        freeze(config)


def test_a_missing_field_is_refused():
    config = make_config({}).unlock()
    del config.spin.loss
    with pytest.raises(UserError, match="--config.spin.loss is missing: start the config from"):
        freeze(config)


# ---- values that may look wrong and are not


@pytest.mark.parametrize(
    "field, given, value",
    [
        ("train.epochs", 2, 2),
        ("spin.beta", (0.1, 5.0), (0.1, 5.0)),
        ("spin.beta", 0.1, (0.1,)),
        ("spin.beta", [0.1, 5], (0.1, 5)),
        ("generate.stop_strings", ["###"], ("###",)),
        ("generate.temperature", 0.0, 0.0),
        ("seed", 2**31 - 1, 2**31 - 1),
        ("mesh.fsdp", 8, 8),
    ],
)
def test_what_a_field_may_be_given(field, given, value):
    config = make_config({field: given})
    assert flatten(freeze(config))[field] == value


def test_an_iteration_beyond_the_tuple_takes_its_last_entry():
    assert [at_iteration((0.1, 0.2, 5.0), t) for t in range(5)] == [0.1, 0.2, 5.0, 5.0, 5.0]
