"""The schema with its defaults, for a run that is given by overrides alone:

    python -m spin_jax.main --config=configs/base.py --workdir=runs/mine \
        --config.model.path=DIR_OR_HUB_ID --config.data.train=FILE_OR_HUB_ID

Every field, its unit and its reason: python -m spin_jax.config
"""

from spin_jax.config import base_config as get_config  # noqa: F401
