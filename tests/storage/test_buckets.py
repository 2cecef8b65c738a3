"""What is written into a bucket, which has neither folders nor appending, is as on disk."""

import itertools
import json
import pathlib
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import UserError
from mae_jax.storage import files
from mae_jax.storage.checkpoints import Checkpoints, read_newest, read_params, save_params, steps_in
from mae_jax.train.metrics import MetricsWriter, read_metrics


def names(folder):
    import fsspec

    found = fsspec.filesystem("gcs").find(str(folder))
    return sorted(name.removeprefix(str(folder).removeprefix("gs://") + "/") for name in found)


@pytest.mark.parametrize(
    ("place", "message"),
    [("s3://runs/a", "gs://BUCKET/FOLDER"), ("gs://", "gs://BUCKET/FOLDER")],
)
def test_other_places_are_refused(place, message):
    with pytest.raises(UserError, match=message):
        files.to_path(place)


def test_without_the_packages_a_bucket_is_refused(monkeypatch):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"gs://runs/a: .* pip install 'mae_jax\[gcs\]'"):
        files.to_path("gs://runs/a")


def test_a_path_keeps_its_two_slashes(bucket):
    path = files.to_path(f"{bucket[0]}/slashes") / "a.txt"
    files.write_atomically(path, "text")
    assert str(path) == "gs://runs/slashes/a.txt"
    assert path.read_text() == "text"
    assert names("gs://runs/slashes") == ["a.txt"]
    with files.local_copy(path) as copy:
        assert pathlib.Path(copy).read_text() == "text"
    assert not pathlib.Path(copy).exists()


def test_what_another_process_wrote_is_seen(bucket):
    import fsspec

    folder = files.to_path(f"{bucket[0]}/seen")
    files.write_atomically(folder / "a", "")
    assert [path.name for path in folder.iterdir()] == ["a"]
    other = fsspec.filesystem("gcs", skip_instance_cache=True)
    other.pipe_file(f"{folder}/b", b"")
    assert [path.name for path in folder.iterdir()] == ["a", "b"]


def test_an_error_while_writing_leaves_what_was_there(bucket):
    path = files.to_path(f"{bucket[0]}/errors/a")
    files.write_atomically(path, "before")

    def write_file():
        with files.complete_or_absent(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    def write_folder():
        with files.complete_or_absent_folder(path.parent) as partial:
            (partial / "b").write_text("half")
            raise KeyError

    for write in (write_file, write_folder):
        with pytest.raises(KeyError):
            write()
    assert names(path.parent) == ["a"]
    assert path.read_text() == "before"


def test_a_folder_replaces_what_it_names_and_nothing_else(bucket):
    folder = files.to_path(f"{bucket[0]}/export")
    files.write_atomically(folder / "other", "stays")
    for content in ("old", "new"):
        with files.complete_or_absent_folder(folder) as partial:
            (partial / "params").mkdir()
            (partial / "params" / content).write_text(content)
            (partial / "card").write_text(content)
    assert names(folder) == ["card", "other", "params/new"]
    assert (folder / "card").read_text() == "new"
    assert not files.unfinished(folder)


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match="gs://none-of-this-name/a: could not be written"):
        files.write_atomically("gs://none-of-this-name/a", "")


def test_metrics_are_appended_and_trimmed(bucket):
    folder = files.to_path(f"{bucket[0]}/metrics")
    writer = MetricsWriter(folder, 0)
    for step in range(4):
        writer.write(step, {"train/loss": step / 2})
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    MetricsWriter(folder, 2).write(3, {"train/loss": 7.0})
    lines = read_metrics(folder / "metrics.jsonl")
    assert [(x["step"], x["train/loss"]) for x in lines] == [(0, 0), (1, 0.5), (2, 1), (3, 7)]
    assert names(folder) == ["metrics.jsonl"]


def test_an_object_that_is_replaced_while_it_is_read_comes_whole(bucket):
    path, over = files.to_path(f"{bucket[0]}/replaced.json"), threading.Event()
    files.write_json(path, {"text": ""})

    def replace():
        for size in itertools.cycle(range(0, 4000, 97)):
            files.write_json(path, {"text": size * "a"})
            if over.is_set():
                return

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        sizes = {len(files.read_json(path)["text"]) for _ in range(100)}
    finally:
        over.set()
        writer.join()
    assert len(sizes) > 5


def test_parameters_come_back(bucket):
    params = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    save_params(f"{bucket[0]}/params", params)
    found = read_params(files.to_path(f"{bucket[0]}/params"))
    np.testing.assert_array_equal(found["a"]["b"], params["a"]["b"])


def test_checkpoints_half_written_or_damaged_are_passed_over(bucket):
    folder = files.to_path(f"{bucket[0]}/checkpoints")
    assert steps_in(folder) == []

    def state(step):
        return {"params": {"w": jnp.full((4, 4), step, jnp.float32)}, "step": jnp.int32(step)}

    checkpoints = Checkpoints(folder, keep=3)
    checkpoints.begin([])
    (folder / "no-checkpoint-yet").unlink()
    with pytest.raises(UserError, match=r"under way before \(metrics\.jsonl\)"):
        checkpoints.begin(["metrics.jsonl"])
    checkpoints.begin([])
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state(step), {"at": step})
    checkpoints.close()
    assert steps_in(folder) == [2, 3, 4]
    (folder / "4" / "commit_success.txt").unlink()  # as a kill leaves it
    assert steps_in(folder) == [2, 3]
    (data,) = [n for n in names(folder / "3/state") if n.startswith("d/")]
    content = bytearray((folder / "3/state" / data).read_bytes())
    for i in range(0, len(content), 7):
        content[i] ^= 255
    (folder / "3/state" / data).write_bytes(bytes(content))

    found, record, notes = read_newest(folder, ["params"])
    assert record["at"] == 2
    assert found["params"]["w"][0, 0] == 2
    assert "checkpoint 3 is damaged" in notes[0]

    checkpoints = Checkpoints(folder, keep=3)
    restored, record = checkpoints.restore_newest(state(0), lambda _: None)
    assert record["at"] == int(restored["step"]) == 2
    assert "damaged-3/commit_success.txt" in names(folder)
    checkpoints.save(3, state(3), {"at": 3})
    checkpoints.close()
    assert steps_in(folder) == [2, 3]
    assert not any(name.startswith("4/") for name in names(folder))  # Orbax tidies up
    assert json.loads((folder / "3/record/metadata").read_text())["at"] == 3
