"""`mae_jax.load`: any weights, any pictures, and the values of the commands."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import mae_jax
from mae_jax import UserError, evaluate, features, pretrained
from mae_jax.interop.export import (
    export_encoder,
    export_hugging_face,
    export_official,
    export_orbax,
)
from mae_jax.models.spec import ModelSpec

MAE = ModelSpec((32, 32), 8, 3, 32, 2, 4, 16, 1, 2, "norm_pixel", 0.75)
CLASSIFIER = dataclasses.replace(
    MAE.without_decoder(),
    target="",
    mask_ratio=0.0,
    pool="mean",
    classes=3,
    class_names=("ant", "bee", "cat"),
)


def random_params(spec):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), spec.abstract_params()
    )


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    export_hugging_face(random_params(MAE), folder, MAE, {})
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    export_encoder(random_params(CLASSIFIER), folder, CLASSIFIER, {})
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures of each class in class folders, of several sizes; one turned by EXIF."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    for i, name in enumerate(CLASSIFIER.class_names * 2):
        path = folder / "val" / name / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)).resize((60 + i, 40))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 2 else 1
        image.save(path, exif=exif, quality=95)
    return folder


def files_of(pictures):
    return sorted(pictures.rglob("*.jpg"))


def test_importing_the_package_imports_no_jax():
    code = "import sys, mae_jax; mae_jax.load; print('jax' in sys.modules, 'PIL' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.split() == [b"False", b"False"]


def test_encode_gives_what_the_features_command_writes(mae, pictures, tmp_path):
    output = tmp_path / "features.npz"
    arguments = [f"--weights={mae}", f"--images={pictures}", f"--output={output}"]
    features.main([*arguments, "--kind", "cls", "mean", "tokens"])
    model = mae_jax.load(mae)
    with np.load(output) as written:
        paths = [pictures / name for name in written["names"]]
        values = model.encode(paths)
        assert values.keys() == {"cls", "mean", "tokens"}
        for kind, x in values.items():
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, written[kind], rtol=1e-5, atol=1e-5)
    assert values["tokens"].shape == (6, 1 + 16, 32)
    np.testing.assert_allclose(values["tokens"][:, 1:].mean(1), values["mean"], atol=1e-5)


def test_paths_opened_pictures_and_arrays_are_one(mae, pictures):
    model = mae_jax.load(str(mae))
    files = files_of(pictures)
    expected = model.pixels(files)
    opened = [Image.open(file) for file in files]
    assert opened[4].getexif()[0x0112] in (1, 6)
    np.testing.assert_array_equal(model.pixels(opened), expected)
    arrays = [
        np.asarray(image.rotate(-90, expand=True) if image.getexif()[0x0112] == 6 else image)
        for image in opened
    ]
    np.testing.assert_array_equal(model.pixels(arrays), expected)
    np.testing.assert_array_equal(model.pixels(expected), expected)  # of its own size: as they are
    np.testing.assert_array_equal(model.pixels(jax.numpy.asarray(expected)), expected)
    larger = np.stack([arrays[0]] * 2)  # [2, 40, 60, 3]: the crop is taken
    np.testing.assert_array_equal(model.pixels(larger), expected[[0, 0]])


def test_reconstruct_keeps_what_is_visible_and_repeats_itself(mae, pictures, monkeypatch):
    model = mae_jax.load(mae)
    images = model.pixels(files_of(pictures))
    result = model.reconstruct(images, mask_ratio=0.5, seed=3)
    assert result["pixels"].dtype == np.uint8
    np.testing.assert_array_equal(result["mask"].sum(axis=1), 8)
    assert result["loss"].shape == (6,)
    hidden = result["mask"].reshape(6, 4, 4).repeat(8, axis=1).repeat(8, axis=2) == 1
    np.testing.assert_array_equal(result["pixels"][~hidden], images[~hidden])
    assert (result["pixels"][hidden] != images[hidden]).mean() > 0.5
    # In batches of another size: the masks are those of the pictures.
    monkeypatch.setattr(pretrained, "BATCH_SIZE", 4)
    again = mae_jax.load(mae).reconstruct(images, mask_ratio=0.5, seed=3)
    np.testing.assert_array_equal(again["mask"], result["mask"])
    np.testing.assert_allclose(again["loss"], result["loss"], rtol=1e-5)
    other = model.reconstruct(images, mask_ratio=0.5, seed=4)
    assert (other["mask"] != result["mask"]).any()


def test_classify_gives_the_probabilities_that_evaluate_scores(classifier, pictures, tmp_path):
    model = mae_jax.load(classifier)
    assert model.class_names == ("ant", "bee", "cat")
    files = files_of(pictures)
    probabilities = model.classify(files)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    labels = np.array([model.class_names.index(file.parent.name) for file in files])
    arguments = [f"--weights={classifier}", "--data=folder", f"--data_dir={pictures}"]
    evaluate.main([*arguments, f"--output={tmp_path / 'scores.json'}"])
    (scores,) = mae_jax.storage.files.read_json(tmp_path / "scores.json")["sets"].values()
    assert scores["top1"] == pytest.approx((probabilities.argmax(axis=1) == labels).mean())
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    assert scores["loss"] == pytest.approx(-np.log(own).mean(), rel=1e-4)
    head = random_params(CLASSIFIER)["head"]
    assert model.encode(files).keys() == {"cls", "mean", "tokens"}
    logits = model.encode(files)["mean"] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(1)[:, None], probabilities, 1e-4)


def test_a_model_says_what_it_is_and_what_it_lacks(mae, classifier, tmp_path):
    text = repr(mae_jax.load(mae))
    assert "2 blocks, width 32, patches of 8, decoder; 32 x 32 px" in text
    model = mae_jax.load(classifier)
    assert "head of 3 classes" in repr(model)
    image = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="no decoder"):
        model.reconstruct(image)
    with pytest.raises(UserError, match="no head"):
        mae_jax.load(mae).classify(image)
    with pytest.raises(UserError, match=r"mask_ratio=0\.999"):
        mae_jax.load(mae).reconstruct(image, mask_ratio=0.999)
    with pytest.raises(UserError, match=r"float64.*give uint8"):
        model.encode(image / 255)
    with pytest.raises(UserError, match="give a list"):
        model.encode(str(tmp_path / "a.jpg"))
    with pytest.raises(UserError, match="at least one"):
        model.encode([])
    with pytest.raises(UserError, match=r"nowhere\.jpg"):
        model.encode([tmp_path / "nowhere.jpg"])
    with pytest.raises(UserError, match="no such file"):
        mae_jax.load(tmp_path / "nowhere")


def test_what_weights_do_not_tell_can_be_said(tmp_path):
    export_official(random_params(MAE), tmp_path, MAE, {})
    from mae_jax.interop.tensor_files import read_tensors, save_safetensors

    tensors, _ = read_tensors(tmp_path / "mae.safetensors")
    save_safetensors(tmp_path / "bare.safetensors", tensors, {"format": "pt"})
    known = {"heads": 4, "decoder_heads": 2, "target": "norm_pixel"}
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    told = mae_jax.load(tmp_path / "bare.safetensors", **known).reconstruct(image)
    own = mae_jax.load(tmp_path / "mae.safetensors").reconstruct(image)
    np.testing.assert_array_equal(told["pixels"], own["pixels"])


def test_patches_are_hidden_as_in_pretraining_unless_said_otherwise(tmp_path):
    trained = {"mask_kind": "grid", "mask_unit": 16, "encoder_tokens": True}
    spec = dataclasses.replace(MAE, image_size=(64, 64), **trained)
    export_orbax(random_params(spec), tmp_path, spec, {})
    model = mae_jax.load(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    mask = model.reconstruct(images)["mask"].reshape(3, 8, 8)
    expected = np.ones((8, 8))
    for row in (0, 1, 4, 5):
        expected[row, [0, 1, 4, 5]] = 0  # the upper left of every 2 x 2 squares of 2 x 2 patches
    np.testing.assert_array_equal(mask, [expected] * 3)

    other = model.reconstruct(images, 0.5, mask_kind="random")["mask"]
    assert (other.sum(axis=1) == 32).all()
    assert len(np.unique(other, axis=0)) == 3
    np.save(tmp_path / "m.npy", expected[::-1] != 0)
    own = model.reconstruct(images, mask_file=tmp_path / "m.npy")
    np.testing.assert_array_equal(own["mask"].reshape(3, 8, 8), [expected[::-1]] * 3)
    for wrong, message in [
        ({"mask_ratio": 0.5}, "mask_kind='grid' keeps one of every 2 x 2: mask_ratio is 0.75"),
        ({"mask_kind": "file"}, "give mask_file"),
        (
            {"mask_kind": "diagonal"},
            "mask_kind 'diagonal': choose one of random",
        ),
        (
            {"mask_file": tmp_path / "m.npy", "mask_ratio": 0.5},
            "leave out mask_kind and mask_",
        ),
        ({"mask_file": tmp_path / "none.npy"}, "mask_file = .*none.npy"),
    ]:
        with pytest.raises(UserError, match=message):
            model.reconstruct(images, **wrong)
