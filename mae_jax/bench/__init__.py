"""How fast the input pipeline or the step is, what the paper's choices save, and what peers do.

    mae-jax bench data --config=RECIPE [--config.FIELD=VALUE ...]
    mae-jax bench step --config=RECIPE [--config.FIELD=VALUE ...]
    mae-jax bench choices --config=RECIPE [--config.FIELD=VALUE ...]
    mae-jax bench peers --config=RECIPE [--config.FIELD=VALUE ...]

`data` times the input pipeline alone, beside a plain Pillow + NumPy one. `step` times the training
step alone, on pixels that are already on the device. `choices` times three of them in turns: with
mask tokens in the encoder, without, and with a decoder of one block besides (paper table 2).
`peers` times the step and that of transformers' ViTMAE in turns (extra `parity`).
"""

import importlib
from collections.abc import Sequence

from mae_jax import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench that the command line names."""
    parser = cli.Parser("bench", __doc__)
    parser.add_argument("bench", choices=("data", "step", "choices", "peers"))
    arguments = cli.parse_recipe(parser, argv)
    importlib.import_module(f"mae_jax.bench.{arguments.bench}").main(arguments.config)
