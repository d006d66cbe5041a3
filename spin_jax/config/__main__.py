"""List every config field: python -m spin_jax.config."""

from spin_jax.config.schema import listing

print(listing())
