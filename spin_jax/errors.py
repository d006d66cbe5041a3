"""The one exception for mistakes that a user can mend, and how its messages write a field."""

import re
import shlex


class UserError(ValueError):
    """A mistake in a config, data file, checkpoint or mesh.

    The message is one line: what was wrong, where (file, row or field), and what to write instead. A field is written
    as the flag that sets it, so that it can be pasted; `spin_jax.api` turns it into what Python takes in its place.
    `spin_jax.main` prints the line without a traceback and exits with status 2.
    """


def as_flag(field: str, value: object) -> str:
    """A field and a value as a shell reads them, such as `--config.spin.beta="(0.1, 5.0)"`; long values are cut."""
    text = value if isinstance(value, str) else repr(value)
    return quoted(f"--config.{field}={text if len(text) <= 100 else text[:97] + '...'}")


def quoted(word: str) -> str:
    """A word as a shell reads it back, with quotes where it needs them; of a flag, around its value."""
    flag = (re.match(r"--[\w.]+=", word) or [""])[0]
    value = word[len(flag) :]
    if not re.fullmatch(r"[\w@%+=:,./~-]*[\w/]", value):
        value = shlex.quote(value) if set('"$`\\!') & set(value) else f'"{value}"'
    return flag + value
