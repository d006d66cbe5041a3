"""Names to things in files of their own."""

import math

import pytest

from spin_jax.errors import UserError
from spin_jax.registry import Registry


def test_a_place_is_imported_when_its_name_is_used():
    registry = Registry({"sqrt": "math:sqrt", "absent": "no.such.module:thing", "one": 1})
    assert list(registry) == ["sqrt", "absent", "one"] and len(registry) == 3 and "absent" in registry
    assert registry["sqrt"] is math.sqrt and registry["one"] == 1
    with pytest.raises(KeyError):
        registry["two"]


def test_what_is_registered_is_the_newest_or_takes_the_place_of_what_has_its_name():
    registry = Registry({"sqrt": "math:sqrt", "one": 1})
    assert registry["sqrt"] is math.sqrt
    registry.register("two", 2)
    registry.register("sqrt", "math:cbrt")
    assert registry["sqrt"] is math.cbrt and list(reversed(registry)) == ["two", "one", "sqrt"]


@pytest.mark.parametrize("place", ["no.such.module:thing", "math:no_such_thing", "no module:thing"])
def test_a_place_where_nothing_is_found_is_named(place):
    registry = Registry({})
    registry.register("mine", place)
    with pytest.raises(UserError, match=f"'mine' is registered as {place}, which cannot be imported .*: write package"):
        registry["mine"]
