"""Models and training states on disk: Hugging Face directories in and out, Orbax."""

from spin_jax.checkpoints.directory import downloaded, read_config, uploaded
from spin_jax.checkpoints.fingerprints import fingerprint
from spin_jax.checkpoints.huggingface import holds, load, save
from spin_jax.checkpoints.peft import describe, resolve, save_adapter
