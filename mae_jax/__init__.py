"""Masked Autoencoders (arXiv 2111.06377) in JAX and Flax."""

__version__ = "0.1.0"
