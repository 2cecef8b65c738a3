"""`python -m mae_jax.bench data|step --config=FILE.py [--config.FIELD=VALUE ...]`.

`data` times the input pipeline alone, beside a plain Pillow + NumPy one. `step` times the training
step alone, on pixels that are already on the device.
"""

import importlib
import sys
from collections.abc import Sequence

from absl import app
from ml_collections import config_flags

BENCHES = ("data", "step")
CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe to measure.")


def main(argv: Sequence[str]) -> None:
    """Runs the bench named on the command line."""
    if len(argv) != 2 or argv[1] not in BENCHES:
        raise app.UsageError(f"name one bench: {' or '.join(BENCHES)}")
    if CONFIG.value is None:
        raise app.UsageError("--config=FILE.py is missing, e.g. --config=configs/quickstart.py")
    bench = importlib.import_module(f"mae_jax.bench.{argv[1]}")
    try:
        bench.main(CONFIG.value)
    except (ValueError, OSError, ImportError) as error:  # bad input: the message is enough
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
