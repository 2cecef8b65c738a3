"""Masked Autoencoders (arXiv 2111.06377) in JAX and Flax."""

__version__ = "0.1.0"


class UserError(ValueError):
    """Something a user can mend; the message names the field or file and the remedy.

    Commands show the message alone and exit with status 2. Every other error is ours, and shows
    its traceback.
    """
