r"""What a model reconstructs, as pictures (paper figures 2 to 4).

On one's own pictures, from a workdir, an official full checkpoint or a Hugging Face folder:

    python -m mae_jax.visualize --weights=W --images a.jpg b.png --mask_ratio=0.5,0.9 \
        --output=grid.png

Patches are hidden as the model was trained, unless --mask_kind, --mask_ratio or --mask_file say
otherwise. Without --weights, masks alone are drawn, on patches of 16 pixels:

    python -m mae_jax.visualize --images a.jpg --mask_kind=random,block,grid --output=masks.png
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("visualize"))

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from mae_jax import UserError, cli
from mae_jax.config import default_config
from mae_jax.models.masking import SAMPLERS
from mae_jax.models.spec import ModelSpec
from mae_jax.pictures.grids import reconstruction_grid
from mae_jax.pretrained import Model, draw_masks, pixels
from mae_jax.storage.files import write_png


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = cli.Parser("visualize", __doc__)
    what = "workdir, file or folder, with decoder; without, masks alone are drawn"
    parser.add_argument("--weights", help=what)
    parser.add_argument("--images", required=True, nargs="+", help="picture files")
    parser.add_argument("--output", required=True, help="the .png to write")
    parser.add_argument("--mask_ratio", type=cli.numbers, default=(None,), help="e.g. 0.5,0.75,0.9")
    parser.add_argument("--mask_kind", default="", help=f"some of {','.join(SAMPLERS)}")
    parser.add_argument("--mask_file", help="masks: .npy, [h, w] or [n, h, w], 1 = hidden")
    what = "pixels, side of the squares hidden, without weights; 0: a patch"
    parser.add_argument("--mask_unit", type=int, default=0, help=what)
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    cli.add_overrides(parser)
    args = parser.parse_args(argv)
    if not args.output.endswith(".png"):
        raise UserError(f"--output={args.output}: the result is a .png file")
    kinds = args.mask_kind.split(",") if args.mask_kind else [None]
    if unknown := sorted(set(kinds) - {None, *SAMPLERS}):
        known = f"choose from {', '.join(SAMPLERS)}, or give --mask_file"
        raise UserError(f"--mask_kind={','.join(unknown)}: {known}")
    if args.weights:
        if args.mask_unit:
            raise UserError("--mask_unit: weights say in which squares they hide; leave it out")
        model = Model(args.weights, **cli.overrides(args))
        spec, source = model.spec, model.source
        note = spec.mae().target.note
    else:
        spec, source, note = _without_weights(args), "masks", ""
    images = pixels(spec, args.images)  # [B, H, W, C]

    def result(ratio: float | None, kind: str | None) -> dict[str, np.ndarray]:
        how = (ratio, args.seed, kind, args.mask_file)
        if args.weights:
            return model.reconstruct(images, *how)
        return {"mask": np.asarray(draw_masks(spec, len(images), *how).mask)}

    sheets = [  # one block of rows a kind and ratio
        reconstruction_grid(
            images,
            **result(ratio, kind),
            names=[pathlib.Path(file).name for file in args.images],
            title=f"{source}, {kind}" if kind else source,
            note=note,
        )
        for kind in kinds
        for ratio in args.mask_ratio
    ]
    write_png(args.output, np.concatenate(sheets))
    print(f"wrote {args.output}")


def _without_weights(args: argparse.Namespace) -> ModelSpec:
    """The paper's model, of `--image_size`, hiding squares of `--mask_unit`."""
    if others := sorted(cli.overrides(args).keys() - {"image_size"}):
        raise UserError(f"--{others[0]}: tells of weights; give --weights, too")
    spec = ModelSpec.from_config(default_config())
    if args.mask_unit < 0 or args.mask_unit % spec.patch_size:
        raise UserError(f"--mask_unit={args.mask_unit}: give a multiple of {spec.patch_size}")
    size = args.image_size or spec.image_size
    return dataclasses.replace(spec, image_size=size, mask_unit=args.mask_unit)
