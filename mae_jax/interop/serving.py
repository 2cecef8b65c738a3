"""A model as one self-contained file for serving (StableHLO by `jax.export`)."""

import io
import pathlib
import zipfile

import jax
import jax.export
import jax.numpy as jnp
from etils import epath

from mae_jax import UserError
from mae_jax.interop.card import write_card
from mae_jax.interop.checkpoint import Checkpoint
from mae_jax.interop.export import DESCRIPTION_FILE, Facts
from mae_jax.models.inference import features_function, segment_function
from mae_jax.storage.files import PathLike, to_path, write_atomically

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FILE = "model.stablehlo"
LOADER_FILE = "serve.py"
LOADER_LIBRARY = "flatbuffers.zip"

# The file is a flatbuffer, whose offsets are 32-bit and signed in places.
MAX_BYTES = 2**31 - 2**26

_LOADER = '''"""{what}. Needs jax and numpy, nothing else.

    import serve
    {name} = serve.load()
    {name}(images)  # uint8 {shape} -> {{{names}}}

or `python serve.py images.npy {name}.npz`.
"""

import json
import pathlib
import sys

import jax
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent


def load(path=HERE / "{file}"):
    """The function in the file: uint8 images of any batch size -> dict of arrays."""
    try:
        import flatbuffers  # noqa: F401  what jax.export reads its files with
    except ImportError:
        sys.path.append(str(HERE / "{library}"))
    from jax import export

    return jax.jit(export.deserialize(bytearray(pathlib.Path(path).read_bytes())).call)


def class_names():
    """What the logits stand for, in their order; empty where nobody knew."""
    return json.loads((HERE / "{description}").read_text()).get("class_names", [])


if __name__ == "__main__":
    images, output = sys.argv[1:]
    np.savez(output, **jax.device_get(load()(np.load(images))))
'''


def export_stablehlo(checkpoint: Checkpoint, directory: PathLike, facts: Facts) -> epath.Path:
    """Writes weights and input normalisation as one function of uint8 images [b, H, W, C], any b.

    It gives what `inference.features_function` does, or `segment_function` where there is a
    segmentation head. Beside it lie a model card and a loader that
    needs jax and numpy alone (it brings the 30 kB reader for the format of `jax.export`).
    """
    spec = checkpoint.spec
    params = checkpoint.params(decoder=False)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if size > MAX_BYTES:
        sizes = f"{size / 1e9:.2f} GB of weights; jax.export holds at most {MAX_BYTES / 1e9:.2f}"
        raise UserError(f"{checkpoint.source}: {sizes}. Export with --format=orbax or timm")
    serve = segment_function(spec) if spec.segments else features_function(spec)
    (b,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, *spec.image_size, spec.channels), jnp.uint8)
    function = jax.jit(lambda images: serve(params, images))
    exported = jax.export.export(function, platforms=PLATFORMS)(images)

    directory = to_path(directory)
    path = directory / FILE
    write_atomically(path, bytes(exported.serialize()))
    shape = f"[b, {spec.image_size[0]}, {spec.image_size[1]}, {spec.channels}]"
    outputs = exported.out_tree.unflatten(exported.out_avals)
    names = ", ".join(f'"{name}"' for name in outputs)
    name = "segment" if spec.segments else "features"
    loader = _LOADER.format(
        what="Classes of pixels" if spec.segments else "Image features",
        name=name,
        shape=shape,
        names=names,
        file=FILE,
        library=LOADER_LIBRARY,
        description=DESCRIPTION_FILE,
    )
    write_atomically(directory / LOADER_FILE, loader)
    write_atomically(directory / DESCRIPTION_FILE, spec.to_json() + "\n")
    write_atomically(directory / LOADER_LIBRARY, _reader_library())
    form = f"as a StableHLO function ({FILE}): uint8 images {shape} to {names}; weights and input "
    form += f"normalisation are inside. Made with jax {jax.__version__}"
    load = "import serve  # serve.py of this folder; needs jax and numpy\n\n"
    output = "classes" if spec.segments else "logits" if spec.classes else "cls"
    load += f'{name} = serve.load()\n{name}(images)["{output}"]'
    write_card(directory, spec, facts, form, load)
    return path


def _reader_library() -> bytes:
    """flatbuffers (Apache-2.0) as an importable zip: `jax.export` needs it and jax lacks it."""
    import flatbuffers

    root = pathlib.Path(flatbuffers.__file__).parent
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.py")):
            archive.write(file, f"flatbuffers/{file.relative_to(root)}")
    return content.getvalue()
