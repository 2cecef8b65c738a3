"""How fast the input pipeline or the step is.

    mae-jax bench data --config=RECIPE [--config.FIELD=VALUE ...]
    mae-jax bench step --config=RECIPE [--config.FIELD=VALUE ...]

`data` times the input pipeline alone, beside a plain Pillow + NumPy one. `step` times the training
step alone, on pixels that are already on the device.
"""

import importlib
from collections.abc import Sequence

from mae_jax import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench that the command line names."""
    parser = cli.Parser("bench", __doc__)
    parser.add_argument("bench", choices=("data", "step"))
    arguments = cli.parse_recipe(parser, argv)
    importlib.import_module(f"mae_jax.bench.{arguments.bench}").main(arguments.config)
