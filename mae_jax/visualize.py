r"""What a model reconstructs, as pictures (paper figures 2 to 4).

On one's own pictures, from a workdir, an official full checkpoint or a Hugging Face folder:

    python -m mae_jax.visualize --weights=W --images a.jpg b.png --mask_ratio=0.5,0.9 \
        --output=grid.png
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("visualize"))

import pathlib
from collections.abc import Sequence

import numpy as np

from mae_jax import UserError, cli
from mae_jax.pictures.grids import reconstruction_grid
from mae_jax.pretrained import Model
from mae_jax.storage.files import write_png


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = cli.Parser("visualize", __doc__)
    parser.add_argument("--weights", required=True, help="workdir, file or folder, with decoder")
    parser.add_argument("--images", required=True, nargs="+", help="picture files")
    parser.add_argument("--output", required=True, help="the .png to write")
    parser.add_argument("--mask_ratio", type=cli.numbers, default=(0.75,), help="e.g. 0.5,0.75,0.9")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    cli.add_overrides(parser)
    args = parser.parse_args(argv)
    if not args.output.endswith(".png"):
        raise UserError(f"--output={args.output}: the result is a .png file")
    model = Model(args.weights, **cli.overrides(args))
    images = model.pixels(args.images)  # [B, H, W, C]
    sheets = [  # one block of rows a ratio
        reconstruction_grid(
            images,
            **model.reconstruct(images, ratio, args.seed),
            names=[pathlib.Path(file).name for file in args.images],
            title=model.source,
            note=model.spec.mae().target.note,
        )
        for ratio in args.mask_ratio
    ]
    write_png(args.output, np.concatenate(sheets))
    print(f"wrote {args.output}")
