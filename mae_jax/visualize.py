r"""What a model reconstructs, as pictures (paper figures 2 to 4).

On one's own pictures, from a workdir, an official full checkpoint or a Hugging Face folder:

    python -m mae_jax.visualize --weights=W --images a.jpg b.png --mask_ratio=0.5,0.9 \
        --output=grid.png
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("visualize"))

import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from mae_jax import UserError, cli
from mae_jax.data.folder import PictureFiles
from mae_jax.data.transforms import EvalTransform
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.models.masking import num_kept, sample_masking
from mae_jax.models.reconstruct import reconstruct
from mae_jax.pictures.grids import reconstruction_grid
from mae_jax.storage.files import write_png


def reconstruct_files(
    weights: str, files: Sequence[str], ratios: Sequence[float], *, seed: int, **overrides: object
) -> np.ndarray:
    """Reconstructions of picture files at several mask ratios, one block of rows a ratio.

    Args:
      weights: with a decoder; see `interop.checkpoint.open_checkpoint`.
      seed: of the masks.
      overrides: what the weights do not tell of themselves.

    Returns:
      [height, width, 3] uint8.

    Raises:
      UserError: bad weights, no decoder, a ratio that hides nothing or everything, or a picture
        that cannot be read, by name.
    """
    checkpoint = open_checkpoint(weights, **overrides)
    d = checkpoint.spec
    patches = d.grid[0] * d.grid[1]
    for ratio in ratios:
        if not (0 < ratio < 1 and 0 < num_kept(patches, ratio) < patches):
            raise UserError(
                f"--mask_ratio={ratio:g}: of {patches} patches at least one must stay and one go"
            )
    model, params = d.mae(position_params=True), checkpoint.params()
    transform = EvalTransform(size=d.image_size, channels=d.channels)
    pictures = PictureFiles("", files)
    images = np.stack([transform.image(pictures[i]) for i in range(len(files))])  # [B, H, W, C]
    keys = jax.random.split(jax.random.key(seed), len(files))
    compute = jax.jit(functools.partial(reconstruct, model, mean=d.mean, std=d.std))
    sheets = []
    for ratio in ratios:
        result = compute(params, images, sample_masking("random", keys, d.grid, ratio))
        sheets.append(
            reconstruction_grid(
                images,
                **jax.device_get(result),
                names=[pathlib.Path(file).name for file in files],
                title=checkpoint.source,
                note=model.target.note,
            )
        )
    return np.concatenate(sheets)


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
    overrides = cli.overrides(args)
    sheet = reconstruct_files(
        args.weights, args.images, args.mask_ratio, seed=args.seed, **overrides
    )
    write_png(args.output, sheet)
    print(f"wrote {args.output}")
