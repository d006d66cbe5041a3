"""The exception for mistakes that a user can mend, and the form in which its messages write a field."""

import re
import shlex


class UserError(ValueError):
    """A mistake in a config, data file, checkpoint or mesh.

    The message is one line: what was wrong, where (file, row or field), and what to write instead. A field is written
    as the flag that sets it, so that it can be pasted; `spin_jax.api` turns it into what Python takes in its place.
    `spin_jax.main` prints the line without a traceback and exits with status 2.
    """


def as_flag(field: str, value: object) -> str:
    """The flag that sets a field, quoted for a shell: `--config.spin.beta="(0.1, 5.0)"`; long values are cut."""
    text = value if isinstance(value, str) else repr(value)
    return quoted(f"--config.{field}={text if len(text) <= 100 else text[:97] + '...'}")


def quoted(word: str) -> str:
    """Quote a word for a shell, if it needs quotes; of a flag, quote the value alone."""
    flag = (re.match(r"--[\w.]+=", word) or [""])[0]
    value = word[len(flag) :]
    if not re.fullmatch(r"[\w@%+=:,./~-]*[\w/]", value):
        value = shlex.quote(value) if set('"$`\\!') & set(value) else f'"{value}"'
    return flag + value
