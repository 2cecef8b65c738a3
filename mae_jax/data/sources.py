"""Where pictures come from: any TFDS dataset, a folder of images, or the embedded default."""

from mae_jax import UserError
from mae_jax.data.record import Source
from mae_jax.storage.files import in_bucket


def open_source(name: str, data_dir: str | None, split: str) -> Source:
    """Opens one split of a dataset: a picklable source with random access to its records.

    Args:
      name: ``demo`` (photographs that ship with scikit-image and scikit-learn), ``folder`` (a
        folder of images), or a TFDS dataset: ``name``, ``name:version``, ``name/config:version``.
      data_dir: the folder of images, or the folder TFDS prepared datasets in; unused by ``demo``.
      split: a split in TFDS notation, e.g. ``train``, ``train[:10%]``, ``train[-64:]``.
    """
    if not name:
        raise UserError("data.name is empty: give `demo`, `folder` or the name of a TFDS dataset")
    # One import per kind of source: TFDS takes half a second that the others need not spend.
    if name == "demo":
        from mae_jax.data.demo import DemoSource

        return DemoSource(split)
    if not data_dir:
        raise UserError(
            f"data.dir is not set, and data.name={name!r} needs it: the folder of images, or that "
            "given to `tfds build --data_dir` (TFDS itself uses ~/tensorflow_datasets)"
        )
    if name == "folder":
        if in_bucket(data_dir):
            remedy = "Copy it, mount it (gcsfuse), or make an array_record data set of it"
            raise UserError(f"data.dir={data_dir}: a folder of pictures must be on disk. {remedy}")
        from mae_jax.data.folder import open_folder

        return open_folder(data_dir, split)
    from mae_jax.data.tfds_source import TfdsSource

    return TfdsSource(name, data_dir, split)
