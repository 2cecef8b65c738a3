"""How fast the input pipeline, the step or the start is, what choices save, and what peers do.

    mae-jax bench data --config=RECIPE [--config.FIELD=VALUE ...]
    mae-jax bench step --config=RECIPE [--config.FIELD=VALUE ...]
    mae-jax bench choices --config=RECIPE [--config.FIELD=VALUE ...]
    mae-jax bench peers --config=RECIPE [--config.FIELD=VALUE ...]
    mae-jax bench start --config=RECIPE [--config.FIELD=VALUE ...] [--rounds=3] [--json]
    mae-jax bench start --config=RECIPE [--config.FIELD=VALUE ...] --trace_only [--json]

`data` times the input pipeline alone, beside a plain Pillow + NumPy one. `step` times the training
step alone, on pixels that are already on the device. `choices` times three of them in turns: with
mask tokens in the encoder, without, and with a decoder of one block besides (paper table 2).
`peers` times the step and that of transformers' ViTMAE in turns (extra `parity`). `start` times the
training command until its first step ends, without and with programs kept by a start before;
`--trace_only` what it does before it compiles the step, of any model, and runs nothing.
"""

import importlib
from collections.abc import Sequence

from mae_jax import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench that the command line names."""
    parser = cli.Parser("bench", __doc__)
    parser.add_argument("bench", choices=("data", "step", "choices", "peers", "start"))
    parser.add_argument("--rounds", type=int, default=3, help="of `start`")
    parser.add_argument("--json", action="store_true", help="of `start`: seconds of every round")
    parser.add_argument("--trace_only", action="store_true", help="of `start`")
    arguments = cli.parse_recipe(parser, argv)
    module = importlib.import_module(f"mae_jax.bench.{arguments.bench}")
    if arguments.bench != "start":
        module.main(arguments.config)
    elif arguments.trace_only:
        module.trace(arguments.config, arguments.json)
    else:
        module.main(arguments.config, arguments.rounds, arguments.json)
