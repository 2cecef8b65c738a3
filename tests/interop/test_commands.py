"""The commands: export, features, visualize; from files and from workdirs."""

import contextlib
import os

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from small_models import SMALL, assert_same_tree, random_params

from mae_jax import UserError, cli, export, features, visualize
from mae_jax.config import default_config
from mae_jax.data.folder import PictureFiles
from mae_jax.evaluators import over_split
from mae_jax.interop.checkpoint import open_checkpoint
from mae_jax.interop.export import export_official
from mae_jax.models.inference import features_function
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.train.state import TrainState


@pytest.fixture
def weights(tmp_path):
    export_official(random_params(), tmp_path / "weights", SMALL, {})
    return str(tmp_path / "weights")


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(21):
        path = tmp_path / "pictures" / ("a" if i % 2 else "b/c") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3)).astype(np.uint8)).save(path)
    return tmp_path / "pictures"


def workdir_of(path, ema, steps=(5, 8)):
    config = default_config()
    config.model.width, config.model.depth, config.model.heads = 32, 2, 4
    config.model.patch_size, config.model.image_size = 8, (32,)
    config.decoder.width, config.decoder.depth, config.decoder.heads = 16, 1, 2
    config.data.name = "demo"
    checkpoints = Checkpoints(path / "checkpoints", keep=3)
    for step in steps:
        state = TrainState(
            step=np.int32(step),
            params=random_params(seed=step),
            opt_state={"mu": random_params(seed=1)},
            ema=random_params(seed=step + 100) if ema else None,
        )
        record = {"config": config.to_dict(), "elapsed_seconds": 7200.0, "version": "0"}
        checkpoints.save(step, state, record)
    checkpoints.close()
    (path / "metrics.jsonl").write_text('{"step": 8, "train/loss": 0.25}\n')
    return path


@pytest.mark.parametrize("ema", [False, True])
def test_a_workdir_gives_its_newest_weights_and_how_they_were_trained(ema, tmp_path):
    checkpoint = open_checkpoint(workdir_of(tmp_path, ema))
    assert_same_tree(checkpoint.params(), random_params(seed=108 if ema else 8))
    assert checkpoint.spec == SMALL
    assert checkpoint.facts["steps"] == 8
    assert checkpoint.facts["images seen"] == 8 * 4096
    assert checkpoint.facts["last train/loss"] == "0.2500"
    assert checkpoint.facts["weights"] == ("moving average" if ema else "as trained")


def test_a_workdir_whose_numbers_changed_on_disk_is_refused(tmp_path):
    path = workdir_of(tmp_path, ema=False, steps=(8,))
    state = path / "checkpoints" / "8" / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(state)
        tree["params"]["encoder"]["norm"]["bias"] = tree["params"]["encoder"]["norm"]["bias"] + 1
        checkpointer.save(state, tree, force=True)
    with pytest.raises(UserError, match="changed on disk, first params/encoder/norm/bias"):
        open_checkpoint(path)


def test_a_workdir_without_a_checkpoint_is_explained(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("format", export.FORMATS)
def test_every_format_is_written_from_a_workdir_with_its_card(format, tmp_path, capsys):
    workdir = workdir_of(tmp_path / "run", ema=False, steps=(8,))
    output = tmp_path / "out"
    export.main([f"--from={workdir}", f"--format={format}", f"--output={output}"])
    assert "wrote" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert "- steps: 8\n" in card
    assert "- data: demo\n" in card
    if format != "stablehlo":
        params = random_params(seed=8)
        expected = {"encoder": params["encoder"]} if format == "timm" else params
        assert_same_tree(open_checkpoint(output).params(), expected)


def error_of(main, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.start(main.__module__.removeprefix("mae_jax."), arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_export_writes_over_nothing(weights, tmp_path, capsys):
    error = error_of(
        export.main, [f"--from={weights}", "--format=timm", f"--output={weights}"], capsys
    )
    assert "exists and is not empty" in error
    error = error_of(
        export.main, ["--from=nowhere", "--format=timm", f"--output={tmp_path / 'x'}"], capsys
    )
    assert "nowhere: there is no such file" in error


def run_features(weights, pictures, output, *more):
    paths = [f"--weights={weights}", f"--images={pictures}", f"--output={output}"]
    features.main([*paths, "--batch_size=8", *more])


def test_features_of_a_folder_in_order_for_every_kind(weights, pictures, tmp_path):
    output = tmp_path / "f.npz"
    run_features(weights, pictures, output, "--kind", "cls", "mean", "tokens")
    with np.load(output) as result:
        names = list(result["names"])
        assert names == sorted(str(p.relative_to(pictures)) for p in pictures.rglob("*.png"))
        assert result["cls"].shape == result["mean"].shape == (21, 32)
        assert result["tokens"].shape == (21, 17, 32)
        np.testing.assert_allclose(result["tokens"][:, 0], result["cls"])
        np.testing.assert_allclose(result["tokens"][:, 1:].mean(axis=1), result["mean"], atol=1e-5)
        last = result["tokens"][20]
    from mae_jax.data.record import Record
    from mae_jax.data.transforms import EvalTransform

    picture = (pictures / names[20]).read_bytes()
    image = EvalTransform(size=(32, 32)).image(Record(picture, -1, "x"))
    params = open_checkpoint(weights).params(decoder=False)
    np.testing.assert_allclose(
        features_function(SMALL)(params, image[None])["tokens"][0], last, atol=1e-5
    )


def test_the_result_is_told_without_reading_it_back(
    weights, pictures, tmp_path, capsys, monkeypatch
):
    """It may be larger than the memory."""
    output, load = tmp_path / "f.npz", np.load

    def load_parts(path, *arguments, **options):
        assert str(path) != str(output)
        return load(path, *arguments, **options)

    monkeypatch.setattr(np, "load", load_parts)
    run_features(weights, pictures, output, "--kind", "cls", "tokens")
    told = capsys.readouterr().out
    assert f"wrote {output}: cls [21, 32], tokens [21, 17, 32], names [21]\n" in told


def test_a_batch_is_rounded_up_to_the_devices(weights, pictures, tmp_path):
    run_features(weights, pictures, tmp_path / "8.npz")
    run_features(weights, pictures, tmp_path / "5.npz", "--batch_size=5")
    with np.load(tmp_path / "8.npz") as eight, np.load(tmp_path / "5.npz") as five:
        np.testing.assert_array_equal(eight["cls"], five["cls"])


def test_the_last_block_by_number_is_the_default_and_the_first_is_not(weights, pictures, tmp_path):
    results = []
    for block in (0, 1, 2):
        output = tmp_path / f"{block}.npz"
        run_features(weights, pictures, output, f"--block={block}")
        with np.load(output) as result:
            results.append(result["cls"])
    np.testing.assert_array_equal(results[0], results[2])
    assert np.abs(results[0] - results[1]).max() > 0.01


def test_features_continue_after_an_interruption(weights, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(over_split, "BATCHES_PER_PART", 1)
    run_features(weights, pictures, tmp_path / "whole.npz")
    broken = pictures / "b/c/20.png"  # of the last of three batches
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    output = tmp_path / "f.npz"
    with pytest.raises(UserError):
        run_features(weights, pictures, output)
    assert not output.exists()
    done = sorted(p.name for p in (tmp_path / "f.npz.parts").glob("*.npz"))
    assert done == ["000000.npz", "000001.npz"]
    broken.write_bytes(content)
    done = pictures / "a" / "01.png"
    stamp = done.stat()
    done.write_bytes(bytes(stamp.st_size))  # not looked at again
    os.utime(done, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    run_features(weights, pictures, output)
    assert not (tmp_path / "f.npz.parts").exists()
    with np.load(output) as result, np.load(tmp_path / "whole.npz") as whole:
        np.testing.assert_array_equal(result["cls"], whole["cls"])


def test_features_compute_only_what_changed_since_they_stopped(
    weights, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(over_split, "BATCHES_PER_PART", 1)
    content = (pictures / "a" / "03.png").read_bytes()
    broken = pictures / "b/c/20.png"  # of the last of three batches
    broken.write_bytes(content[:200])
    output = tmp_path / "f.npz"
    with pytest.raises(UserError) as refusal:
        run_features(weights, pictures, output)
    told = str(refusal.value)
    assert "20.png" in told
    assert "--bad_records=skip" in told
    assert "data.bad_records" not in told  # which is how training calls it
    # 11 + 5 pictures are done. One of them goes, one changes, one is new, and the broken one goes.
    broken.unlink()
    (pictures / "a" / "05.png").unlink()
    (pictures / "a" / "07.png").write_bytes(content)
    (pictures / "a" / "00.png").write_bytes(content)
    read = []
    getitem = PictureFiles.__getitem__

    def counted(self, index):
        record = getitem(self, index)
        read.append(os.path.relpath(record.name, pictures))
        return record

    monkeypatch.setattr(PictureFiles, "__getitem__", counted)
    run_features(weights, pictures, output)
    assert sorted(read) == ["a/00.png", "a/07.png", *(f"b/c/{i}.png" for i in (12, 14, 16, 18))]
    run_features(weights, pictures, tmp_path / "whole.npz")
    with np.load(output) as result, np.load(tmp_path / "whole.npz") as whole:
        assert list(result["names"]) == list(whole["names"])
        assert len(result["names"]) == 20
        np.testing.assert_allclose(result["cls"], whole["cls"], rtol=1e-5, atol=1e-6)


def test_pictures_that_cannot_be_decoded_are_left_out_by_name(weights, pictures, tmp_path):
    run_features(weights, pictures, tmp_path / "whole.npz")
    (pictures / "a" / "01.png").write_bytes(b"damaged")
    run_features(weights, pictures, tmp_path / "f.npz", "--bad_records=skip")
    with np.load(tmp_path / "f.npz") as result, np.load(tmp_path / "whole.npz") as whole:
        names = list(whole["names"])
        assert names[0] == "a/01.png"
        assert list(result["names"]) == names[1:]
        np.testing.assert_array_equal(result["cls"], whole["cls"][1:])


def test_parts_of_another_extraction_are_not_mixed_in(weights, pictures, tmp_path, capsys):
    (pictures / "b/c/20.png").write_bytes(b"damaged")
    output = tmp_path / "f.npz"
    with pytest.raises(UserError, match=r"b/c/20.png"):
        run_features(weights, pictures, output)
    arguments = [f"--weights={weights}", f"--images={pictures}", f"--output={output}"]
    error = error_of(features.main, [*arguments, "--batch_size=8", "--block=1"], capsys)
    assert "another extraction (other block)" in error


def test_features_explain_bad_input(weights, pictures, tmp_path, capsys):
    good = {"weights": weights, "images": pictures, "output": tmp_path / "f.npz", "batch_size": 8}
    for change, message in (
        ({"output": tmp_path / "f.npy"}, "is an .npz file"),
        ({"images": tmp_path / "nowhere"}, "there is no folder"),
        ({"images": weights}, "no picture below"),
        ({"batch_size": 0}, "needs at least 1"),
        ({"block": 3}, "blocks 1 to 2"),
    ):
        arguments = [f"--{name}={value}" for name, value in (good | change).items()]
        assert message in error_of(features.main, arguments, capsys)


def test_reconstructions_of_own_pictures_at_several_ratios(weights, pictures, tmp_path):
    files = [str(pictures / "a" / "01.png"), str(pictures / "b" / "c" / "00.png")]
    output = tmp_path / "grid.png"
    arguments = [f"--weights={weights}", f"--output={output}", "--images", *files]
    visualize.main([*arguments, "--mask_ratio=0.75"])
    with Image.open(output) as one:
        width, height = one.size
    visualize.main([*arguments, "--mask_ratio=0.5,0.75,0.9"])
    with Image.open(output) as three:
        assert three.size == (width, 3 * height)


def test_masks_are_drawn_without_a_model(pictures, tmp_path, capsys):
    files = ["--images", str(pictures / "a" / "01.png"), f"--output={tmp_path / 'masks.png'}"]
    visualize.main([*files, "--mask_ratio=0.75", "--mask_kind=random,block,grid"])
    with Image.open(tmp_path / "masks.png") as image:
        three = np.asarray(image)
    np.save(tmp_path / "m.npy", np.arange(196).reshape(14, 14) < 147)
    visualize.main([*files, f"--mask_file={tmp_path / 'm.npy'}"])
    with Image.open(tmp_path / "masks.png") as image:
        own = np.asarray(image)
    assert three.shape == (3 * own.shape[0], *own.shape[1:])
    # As much is grey whichever way it is hidden: 75 % of 224 x 224, and the note of what is drawn.
    grey = [(x == 128).all(axis=-1).sum() for x in (*np.split(three, 3), own)]
    assert max(grey) - min(grey) < 224
    assert min(grey) > 0.74 * 224**2
    for wrong, message in [
        (
            ["--mask_kind=blok"],
            "--mask_kind=blok: choose from random, block, grid, or",
        ),
        (["--mask_unit=20"], "--mask_unit=20: give a multiple of 16"),
        (["--mask_unit=-16"], "--mask_unit=-16: give a multiple of 16"),
        (["--heads=3"], "--heads: tells of weights"),
        (["--mask_unit=32", "--weights=w"], "--mask_unit: weights say in which squares"),
    ]:
        assert message in error_of(visualize.main, [*files, *wrong], capsys)


@pytest.mark.parametrize("ratio", ["0.999", "0", "1", "-0.5", "nan", "0.5,0.999"])
def test_a_mask_that_leaves_nothing_is_refused(ratio, weights, pictures, tmp_path, capsys):
    arguments = [f"--weights={weights}", f"--output={tmp_path / 'g.png'}", f"--mask_ratio={ratio}"]
    error = error_of(visualize.main, [*arguments, "--images", str(pictures / "a/01.png")], capsys)
    assert error.startswith("error: mask_ratio=")
    assert not (tmp_path / "g.png").exists()


def test_visualize_needs_a_decoder_and_says_so(pictures, tmp_path, capsys):
    with contextlib.redirect_stdout(None):
        export_official(random_params(), tmp_path / "w", SMALL, {})
        export.main([f"--from={tmp_path / 'w'}", "--format=timm", f"--output={tmp_path / 'e'}"])
    arguments = [f"--weights={tmp_path / 'e'}", "--images", str(pictures / "a" / "01.png")]
    error = error_of(visualize.main, [*arguments, f"--output={tmp_path / 'g.png'}"], capsys)
    assert "no decoder" in error
