"""List every config field: python -m spin_jax.config."""

import textwrap

from spin_jax.config.fields import FREE, Field
from spin_jax.config.schema import FIELDS
from spin_jax.errors import as_flag


def listing() -> str:
    """Every field as the flag that sets its default, with its documentation, its words and its bounds."""
    return "\n\n".join(f"{as_flag(name, field.default)}\n{_described(field)}" for name, field in FIELDS.items())


def _described(field: Field) -> str:
    text = field.doc
    if words := field.words():
        text += f" One of {', '.join(words)}."
    if field.bounds:
        lowest, highest, inclusive = field.bounds
        text += f" {'At least' if inclusive else 'Above'} {lowest}, at most {highest:,}."
    if field.resume == FREE:
        text += " May change on resume."
    return textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")


if __name__ == "__main__":
    print(listing())
