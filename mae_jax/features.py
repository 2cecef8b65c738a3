"""Features of a folder of pictures.

    python -m mae_jax.features --weights=WEIGHTS --images=FOLDER --output=features.npz

`--weights` is a workdir or weights in any format that is read. The result holds `names` [N] (paths
below the folder, sorted) and one float32 array per `--kind`: `cls` [N, D], `mean` [N, D] over the
patches, `tokens` [N, 1 + L, D], of a classifier `logits` [N, K]. They have passed the final norm.
Weights fine-tuned on the mean token have none: there `mean`, then the default, has passed the norm
before the head, `cls` and `tokens` are as the last block leaves them. Batches run over all devices
of this machine. Work in progress is kept in `OUTPUT.parts/`; the same command continues there after
an interruption, with whatever pictures are there then. `--bad_records=skip` leaves out, by name,
pictures that cannot be decoded.
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("features"))

import argparse
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mae_jax import UserError, cli
from mae_jax.data.folder import PictureFiles, list_pictures
from mae_jax.data.record import DecodeError
from mae_jax.data.transforms import EvalTransform
from mae_jax.distributed.mesh import make_mesh, replicate
from mae_jax.evaluators.over_split import OverSplit, Parts
from mae_jax.models.inference import features_function
from mae_jax.storage.files import complete_or_absent, to_path

KINDS = ("cls", "mean", "tokens", "logits")


def extract(args: argparse.Namespace) -> None:
    """Writes `args.output`, its options those of `main`; see the module's docstring."""
    path = to_path(args.output)
    if path.suffix != ".npz":
        raise UserError(f"--output={path}: the result is an .npz file")
    root = pathlib.Path(args.images).expanduser().resolve()
    names = sorted(list_pictures(root, "--images"))
    checkpoint = cli.open_weights(args.weights, cli.overrides(args))
    d = checkpoint.spec
    kinds = tuple(dict.fromkeys(args.kind)) or (d.summary,)
    compute = features_function(d, block=args.block, dtype=jnp.dtype(args.dtype))
    if "logits" in kinds and not (d.classes and args.block in (0, d.depth)):
        raise UserError("--kind=logits: needs a classifier, and all of its blocks")

    def features(params: Any, batch: dict, _: jax.Array) -> dict:
        values = compute(params, batch["image"])
        return {kind: values[kind] for kind in kinds} | {"weight": batch["weight"]}

    run = OverSplit(features, make_mesh(), args.batch_size)
    key = {
        "weights": checkpoint.digest(),
        "images": str(root),
        "kinds": list(kinds),
        "model": str(d),
        "block": args.block,
        "dtype": args.dtype,
    }
    folder = path.with_name(path.name + ".parts")
    status = [os.stat(root / name) for name in names]
    versions = [f"{n} {s.st_size} {s.st_mtime_ns}" for n, s in zip(names, status, strict=True)]
    parts = Parts(folder, key, np.asarray(versions))
    if parts.foreign:
        raise UserError(
            f"{folder} holds parts of another extraction (other {', '.join(sorted(parts.foreign))})"
            ". Delete it, or choose another --output"
        )
    try:
        parts.compute(
            run,
            replicate(checkpoint.params(decoder=False), run.mesh),
            PictureFiles(root, names),
            EvalTransform(size=d.image_size, channels=d.channels),
            label="features",
            bad_records=args.bad_records,
        )
    except DecodeError as error:
        raise DecodeError(
            f"{error.__cause__ or error}. Mend or remove it, or leave such pictures out with "
            f"--bad_records=skip; the same command then goes on after what {folder} holds"
        ) from error
    shapes = _assemble(path, names, kinds, parts)
    folder.rmtree()
    print(f"wrote {path}: {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}")


def _assemble(
    path: epath.Path, names: list[str], kinds: tuple[str, ...], parts: Parts
) -> dict[str, tuple[int, ...]]:
    """Joins the parts into one .npz, one part in memory at a time; the shapes of its arrays."""
    there = parts.array("weight") > 0  # [N], False: not decodable
    shapes: dict[str, tuple[int, ...]] = {}
    with (
        complete_or_absent(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for kind in kinds:
            with archive.open(f"{kind}.npy", "w", force_zip64=True) as stream:
                done = 0
                for block in parts.read(kind):  # [n, ...]
                    if not done:
                        shapes[kind] = (int(there.sum()), *block.shape[1:])
                        header = {"descr": "<f4", "fortran_order": False, "shape": shapes[kind]}
                        np.lib.format.write_array_header_2_0(stream, header)
                    kept = block[there[done : done + len(block)]]
                    stream.write(np.ascontiguousarray(kept, "<f4").tobytes())
                    done += len(block)
        with archive.open("names.npy", "w") as stream:
            np.lib.format.write_array(stream, np.asarray(names)[there], allow_pickle=False)
    return {**shapes, "names": (int(there.sum()),)}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = cli.Parser("features", __doc__)
    parser.add_argument("--weights", required=True, help="workdir, file or folder")
    parser.add_argument("--images", required=True, help="folder; its sub-folders are searched")
    parser.add_argument("--output", required=True, help="the .npz to write")
    kinds = "what to keep (default: cls; mean for weights fine-tuned on the mean token)"
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=[], help=kinds)
    block = "tokens after this block (1 to depth) and the final norm, if there is one; 0: the last"
    parser.add_argument("--block", type=int, default=0, help=block)
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at once, all devices")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    skip = "skip leaves out pictures that cannot be decoded; names tell which are there"
    parser.add_argument("--bad_records", choices=("stop", "skip"), default="stop", help=skip)
    cli.add_overrides(parser)
    extract(parser.parse_args(argv))
