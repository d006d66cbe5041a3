"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in a config, data file, checkpoint or mesh.

    The message is one line: what was wrong, where (file, row or field), and what to write instead. `spin_jax.main`
    prints it without a traceback and exits with status 2.
    """
