"""Pictures and TFDS datasets written by hand, without TFDS and without TensorFlow."""

import io
import json
import pathlib
import struct

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2


def jpeg(height, width, seed=0, mode="RGB", **options):
    """A smooth random picture as JPEG bytes."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, len(mode) if mode != "L" else 1), np.uint8)
    image = Image.fromarray(small.squeeze(), mode=mode).resize((width, height), Image.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def crc32c(data):
    """Bit by bit, straight from the polynomial; masked as TFRecord does it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write_tfrecord(path, records):
    with open(path, "wb") as f:
        for record in records:
            length = struct.pack("<Q", len(record))
            f.write(length + struct.pack("<I", crc32c(length)))
            f.write(record + struct.pack("<I", crc32c(record)))


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


class TinyDataset:
    """Builds ``<root>/tiny/1.0.0`` with splits of given shard lengths; knows what it wrote.

    `label_maps`: the name of a feature, an Image, or `LabeledImage` for one of that kind.
    """

    def __init__(
        self,
        root,
        file_format,
        splits,
        image_key="image",
        labelled=True,
        version="1.0.0",
        label_maps=None,
    ):
        self.root, self.written = str(root), {}
        self.folder = pathlib.Path(root) / "tiny" / version
        self.folder.mkdir(parents=True)
        write = {"array_record": write_array_record, "tfrecord": write_tfrecord}[file_format]
        infos = []
        for split, shard_lengths in splits.items():
            self.written[split] = []
            for shard, length in enumerate(shard_lengths):
                records = []
                for _ in range(length):
                    number = len(self.written[split])
                    image = jpeg(20 + number, 24, seed=number)
                    self.written[split].append((image, number % 3))
                    example = tf_example_pb2.Example()
                    feature = example.features.feature
                    feature[image_key].bytes_list.value.append(image)
                    feature["file_name"].bytes_list.value.append(f"{split}{number}.jpg".encode())
                    if label_maps:
                        file = io.BytesIO()
                        Image.new("L", (24, 20 + number), number % 3).save(file, "PNG")
                        feature[label_maps].bytes_list.value.append(file.getvalue())
                    if labelled:
                        feature["label"].int64_list.value.append(number % 3)
                    records.append(example.SerializeToString())
                write(self.path(split, shard, len(shard_lengths), file_format), records)
            infos.append(
                {
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    "name": split,
                    "numBytes": "1",
                    "shardLengths": [str(n) for n in shard_lengths],
                }
            )
        info = {
            "name": "tiny",
            "version": version,
            "moduleName": "m",
            "fileFormat": file_format,
            "splits": infos,
        }
        (self.folder / "dataset_info.json").write_text(json.dumps(info))
        base = "tensorflow_datasets.core.features."
        shape = {"dimensions": ["-1", "-1", "3"]}
        features = {
            image_key: {
                "pythonClassName": base + "image_feature.Image",
                "image": {"dtype": "uint8", "shape": shape, "encodingFormat": "jpeg"},
            },
            "file_name": {"pythonClassName": base + "text_feature.Text", "text": {}},
        }
        if labelled:
            features["label"] = {
                "pythonClassName": base + "class_label_feature.ClassLabel",
                "classLabel": {"numClasses": "3"},
            }
            (self.folder / "label.labels.txt").write_text("ant\nbee\ncat\n")
        if label_maps:
            named = label_maps == "LabeledImage"
            shape = {"dimensions": ["-1", "-1", "1"]}
            features[label_maps] = {
                "pythonClassName": base
                + ("labeled_image.LabeledImage" if named else "image_feature.Image"),
                "image": {"dtype": "uint8", "shape": shape, "encodingFormat": "png"},
            }
            if named:
                features[label_maps]["image"]["label"] = {"numClasses": "2"}
                (self.folder / f"{label_maps}.labels.txt").write_text("sky\nroad\n")
        features = {
            "pythonClassName": base + "features_dict.FeaturesDict",
            "featuresDict": {"features": features},
        }
        (self.folder / "features.json").write_text(json.dumps(features))

    def path(self, split, shard, shards, file_format):
        return self.folder / f"tiny-{split}.{file_format}-{shard:05d}-of-{shards:05d}"
