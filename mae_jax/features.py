"""Features of a folder of pictures.

    python -m mae_jax.features --weights=WEIGHTS --images=FOLDER --output=features.npz

`--weights` is a workdir or weights in any format that is read. The result holds `names` [N] (paths
below the folder, sorted) and one float32 array per `--kind`: `cls` [N, D], `mean` [N, D] over the
patches, `tokens` [N, 1 + L, D], of a classifier `logits` [N, K]. They have passed the final norm.
Weights fine-tuned on the mean token have none: there `mean`, then the default, has passed the norm
before the head, `cls` and `tokens` are as the last block leaves them. Batches run over all devices
of this machine. Work in progress is kept in `OUTPUT.parts/`; the same command continues there after
an interruption.
"""

import argparse
import concurrent.futures
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mae_jax import UserError
from mae_jax.data.folder import PictureFiles, list_pictures
from mae_jax.data.transforms import EvalTransform
from mae_jax.distributed.mesh import batch_sharding, make_mesh, replicate
from mae_jax.interop import arguments
from mae_jax.interop.build import features_function, model_params
from mae_jax.storage.files import complete_or_absent, write_atomically

KINDS = ("cls", "mean", "tokens", "logits")
BATCHES_PER_PART = 16


def extract(
    weights: str,
    images: str,
    output: str,
    *,
    kinds: tuple[str, ...] = (),
    block: int = 0,
    batch_size: int = 64,
    dtype: str = "float32",
    known: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes `output`; see the module's docstring.

    Args:
      kinds: of `KINDS`; empty for the token a head reads, `cls` where there is none.
      batch_size: pictures at once; rounded up to a multiple of the devices.
      known: see `open_checkpoint`.

    Raises:
      FileNotFoundError, UserError: bad weights or no pictures.
      UserError: `output` is not an .npz, its parts belong to another extraction, or there are
        no logits.
      DecodeError: a picture that cannot be read, by name.
    """
    path = pathlib.Path(output)
    if path.suffix != ".npz":
        raise UserError(f"--output={output}: the result is an .npz file")
    mesh = make_mesh()
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size}: needs at least 1")
    batch_size = math.ceil(batch_size / mesh.size) * mesh.size
    names = sorted(list_pictures(images, "--images"))
    checkpoint = arguments.open_weights(weights, known)
    d = checkpoint.description
    kinds = kinds or (d.pool or "cls",)
    features = features_function(d, block=block, dtype=jnp.dtype(dtype))
    if "logits" in kinds and not (d.classes and block in (0, d.depth)):
        raise UserError("--kind=logits: needs a classifier, and all of its blocks")
    params = replicate(model_params(checkpoint), mesh)
    plan = {
        "weights": checkpoint.digest(),
        "images": str(pathlib.Path(images).expanduser().resolve()),
        "names": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "kinds": list(kinds),
        "model": str(d),
        "block": block,
        "batch_size": batch_size,
        "dtype": dtype,
    }
    parts = path.with_name(path.name + ".parts")
    _open_parts(parts, plan)

    @jax.jit
    def run(params: Any, batch: jax.Array) -> dict[str, jax.Array]:
        values = features(params, batch)
        return {kind: values[kind] for kind in kinds}

    transform = EvalTransform(size=d.image_size, channels=d.channels)

    def load(name: str) -> np.ndarray:
        return transform.image(PictureFiles(images, [name])[0])

    step = batch_size * BATCHES_PER_PART
    chunks = [names[start : start + step] for start in range(0, len(names), step)]
    files = [parts / f"{number:06d}.npz" for number in range(len(chunks))]
    done = [file.is_file() for file in files]
    progress = tqdm(total=len(names), unit="image", disable=not sys.stderr.isatty())
    progress.update(sum(len(c) for c, there in zip(chunks, done, strict=True) if there))
    for chunk, file, there in zip(chunks, files, done, strict=True):
        if there:
            continue
        values: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
        for batch in _batches(chunk, load, batch_size):
            padded = np.zeros((batch_size, *batch.shape[1:]), np.uint8)
            padded[: len(batch)] = batch
            result = run(params, jax.device_put(padded, batch_sharding(mesh)))
            for kind in kinds:
                values[kind].append(np.asarray(result[kind])[: len(batch)])
            progress.update(len(batch))
        content = io.BytesIO()
        np.savez(content, **{kind: np.concatenate(rows) for kind, rows in values.items()})
        write_atomically(file, content.getvalue())
    progress.close()
    _assemble(path, names, kinds, files)
    shutil.rmtree(parts)
    return path


def _batches(
    names: list[str], load: Callable[[str], np.ndarray], batch_size: int
) -> Iterator[np.ndarray]:
    """uint8 [b, H, W, C], the next one decoded by threads while the current one is used."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(names), batch_size)
        groups = [names[start : start + batch_size] for start in starts]
        ahead = [pool.submit(load, name) for name in groups[0]]
        for number in range(len(groups)):
            current, ahead = ahead, []
            if number + 1 < len(groups):
                ahead = [pool.submit(load, name) for name in groups[number + 1]]
            yield np.stack([future.result() for future in current])


def _open_parts(parts: pathlib.Path, plan: dict[str, Any]) -> None:
    """Makes the folder of parts, or checks that what is there is of the same extraction."""
    file = parts / "plan.json"
    if file.is_file():
        old = json.loads(file.read_text())
        if differing := sorted(key for key in plan if old.get(key) != plan[key]):
            raise UserError(
                f"{parts} holds parts of another extraction (other {', '.join(differing)}). "
                "Delete it, or choose another --output"
            )
    else:
        write_atomically(file, json.dumps(plan, indent=2))


def _assemble(
    path: pathlib.Path, names: list[str], kinds: tuple[str, ...], files: list[pathlib.Path]
) -> None:
    """Joins the parts into one .npz, one part in memory at a time."""
    with (
        complete_or_absent(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for kind in kinds:
            with np.load(files[0]) as first:
                shape = (len(names), *first[kind].shape[1:])
            with archive.open(f"{kind}.npy", "w", force_zip64=True) as stream:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(stream, header)
                for file in files:
                    with np.load(file) as part:
                        stream.write(np.ascontiguousarray(part[kind], "<f4").tobytes())
        with archive.open("names.npy", "w") as stream:
            np.lib.format.write_array(stream, np.asarray(names), allow_pickle=False)


def main(argv: list[str] | None = None) -> None:
    """Entry point; bad input ends with its message and exit status 2, not with a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m mae_jax.features", description="Writes features of a folder of pictures."
    )
    parser.add_argument("--weights", required=True, help="workdir, file or folder")
    parser.add_argument("--images", required=True, help="folder; its sub-folders are searched")
    parser.add_argument("--output", required=True, help="the .npz to write")
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=KINDS,
        default=[],
        help="what to keep (default: cls; mean for weights fine-tuned on the mean token)",
    )
    parser.add_argument(
        "--block",
        type=int,
        default=0,
        help="tokens after this block (1 to depth), through the final norm if there is one; "
        "0: the last block",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at once, all devices")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments.add_known(parser)
    args = parser.parse_args(argv)
    try:
        path = extract(
            args.weights,
            args.images,
            args.output,
            kinds=tuple(dict.fromkeys(args.kind)),
            block=args.block,
            batch_size=args.batch_size,
            dtype=args.dtype,
            known=arguments.known(args),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with np.load(path) as result:
        shapes = ", ".join(f"{name} {list(result[name].shape)}" for name in result.files)
    print(f"wrote {path}: {shapes}")


if __name__ == "__main__":
    main()
