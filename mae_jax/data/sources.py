"""Where pictures come from: any TFDS dataset, a folder of images, or the embedded default."""

from mae_jax import UserError
from mae_jax.data.record import Source
from mae_jax.storage.files import in_bucket


def open_source(
    name: str, data_dir: str | None, split: str, *, segmentation: bool = False
) -> Source:
    """Opens one split of a dataset: a picklable source with random access to its records.

    Args:
      name: ``demo`` (photographs that ship with scikit-image and scikit-learn), ``folder`` (a
        folder of images), ``segmentation_folder`` (one of images and one of label maps), or a TFDS
        dataset: ``name``, ``name:version``, ``name/config:version``.
      data_dir: the folder of images, or the folder TFDS prepared datasets in; unused by ``demo``.
      split: a split in TFDS notation, e.g. ``train``, ``train[:10%]``, ``train[-64:]``.
      segmentation: records are to have label maps, and the classes are those of the maps.
    """
    if not name:
        raise UserError(
            "data.name is empty: give `demo`, `folder`, `segmentation_folder` or a TFDS set"
        )
    # One import per kind of source: TFDS takes half a second that the others need not spend.
    if name == "demo":
        from mae_jax.data.demo import DemoSource

        if segmentation:
            raise _without_maps(name)
        return DemoSource(split)
    if not data_dir:
        raise UserError(
            f"data.dir is not set, and data.name={name!r} needs it: the folder of images, or that "
            "given to `tfds build --data_dir` (TFDS itself uses ~/tensorflow_datasets)"
        )
    if name in ("folder", "segmentation_folder") and in_bucket(data_dir):
        remedy = "Copy it, mount it (gcsfuse), or make an array_record data set of it"
        raise UserError(f"data.dir={data_dir}: a folder of pictures must be on disk. {remedy}")
    if name == "folder":
        from mae_jax.data.folder import open_folder

        if segmentation:
            raise _without_maps(name)
        return open_folder(data_dir, split)
    if name == "segmentation_folder":
        from mae_jax.data.segmentation_folder import open_segmentation_folder

        source = open_segmentation_folder(data_dir, split)
        return source if segmentation else source.images
    from mae_jax.data.tfds_source import TfdsSource

    return TfdsSource(name, data_dir, split, segmentation)


def _without_maps(name: str) -> UserError:
    remedy = "choose data.name=segmentation_folder, or a TFDS data set that has them"
    return UserError(f"data.name={name!r} has no label maps: {remedy}")
