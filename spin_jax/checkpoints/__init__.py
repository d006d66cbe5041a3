"""Models and training states on disk: Hugging Face directories in and out, Orbax."""

from spin_jax.checkpoints.directory import describe, downloaded, read_config, resolve, uploaded
from spin_jax.checkpoints.fingerprints import fingerprint
from spin_jax.checkpoints.huggingface import holds, load, save
