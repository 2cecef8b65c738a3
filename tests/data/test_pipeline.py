import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tiny_dataset import jpeg

from mae_jax import UserError
from mae_jax.data.order import Windows
from mae_jax.data.pipeline import eval_batches, example_index, example_rng, train_batches
from mae_jax.data.record import ArraySpec, DecodeError, LabelError, Record
from mae_jax.data.transforms import EvalTransform, TrainTransform

TRANSFORM = TrainTransform((16, 16))


@dataclasses.dataclass
class Pictures:
    """n small JPEGs, those in `bad` cut short; the label is the index."""

    n: int
    bad: tuple[int, ...] = ()
    name: str = "pictures"
    split: str = "train"
    num_classes: int | None = None
    class_names: list[str] | None = None

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        data = jpeg(24, 24, seed=i)
        data = data[:200] if i in self.bad else data
        return Record(data, i, f"pictures/train#{i}", id=i)


class ReadInPieces(Pictures):
    """Many at a time, as from a bucket."""

    def read(self, start, stop):
        return {i: self[i] for i in range(start, stop)}


def train(source, batch_size=4, positions=None, transform=TRANSFORM, **options):
    positions = np.arange(batch_size) if positions is None else positions
    return train_batches(
        source,
        transform,
        **{"seed": 3, "batch_size": batch_size, "positions": positions, **options},
    )


def take(batches):
    with batches:
        return list(batches)


def labels(batches):
    return np.concatenate([b["label"] for b in take(batches)])


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


@pytest.mark.parametrize("n", [1, 2, 5, 400, 4097])
def test_every_epoch_is_every_record_once(n):
    for seed in (0, 1, 2**40):
        for epoch in (0, 1, 7):
            order = [example_index(seed, epoch * n + i, n) for i in range(n)]
            assert sorted(order) == list(range(n))


def test_order_differs_between_epochs_and_seeds():
    orders = {
        tuple(example_index(seed, epoch * 100 + i, 100) for i in range(100))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_epochs_follow_without_a_seam_and_drop_nothing():
    got = labels(train(Pictures(10), batch_size=4, end_step=5))  # 20 examples: two epochs
    assert sorted(got[:10]) == sorted(got[10:]) == list(range(10))


def test_batch_may_be_larger_than_the_dataset():
    got = labels(train(Pictures(3), batch_size=8, end_step=3))
    assert np.bincount(got).tolist() == [8, 8, 8]


def test_batches_have_the_promised_types():
    (batch,) = take(train(Pictures(5), batch_size=4, end_step=1))
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
        "image": (np.uint8, (4, 16, 16, 3)),
        "label": (np.int32, (4,)),
        "id": (np.int32, (4,)),
    }


def test_crop_depends_on_seed_and_example_alone():
    source = Pictures(5)
    (batch,) = take(train(source, batch_size=4, start_step=6, end_step=7, threads=3))
    for position in range(4):
        g = 6 * 4 + position
        record = source[example_index(3, g, 5)]
        np.testing.assert_array_equal(
            batch["image"][position], TRANSFORM(record, example_rng(3, g))["image"]
        )
    assert example_rng(3, 24).random() != example_rng(3, 25).random()
    assert example_rng(3, 24).random() != example_rng(4, 24).random()


def test_starting_at_a_step_equals_having_run_to_it():
    whole = take(train(Pictures(7), end_step=8))
    assert_equal(take(train(Pictures(7), start_step=5, end_step=8)), whole[5:])


def test_endless_stream_starts_anywhere():
    with train(Pictures(7), start_step=10**12) as batches:
        far = next(batches)
    assert_equal([far], take(train(Pictures(7), start_step=10**12, end_step=10**12 + 1)))


def test_processes_together_see_the_batch_of_one():
    whole = take(train(Pictures(11), batch_size=6, end_step=4))
    for parts in ([[0, 1, 2], [3, 4, 5]], [[5, 0], [2], [1, 4, 3]]):
        for part in parts:
            got = take(train(Pictures(11), batch_size=6, positions=np.array(part), end_step=4))
            assert_equal(got, [{k: v[part] for k, v in b.items()} for b in whole])


def test_threads_and_prefetch_change_nothing():
    expected = take(train(Pictures(9), batch_size=5, end_step=6, threads=1, prefetch=1))
    assert_equal(
        take(train(Pictures(9), batch_size=5, end_step=6, threads=7, prefetch=4)), expected
    )


def test_worker_processes_change_nothing_and_pass_errors_on():
    options = {"batch_size": 4, "end_step": 5, "bad_records": "skip"}
    expected = train(Pictures(6, bad=(2,)), **options)
    got = train(Pictures(6, bad=(2,)), workers=2, **options)
    assert_equal(take(got), take(expected))
    assert got.skipped == expected.skipped == 3
    with (
        train(Pictures(6, bad=(2,)), workers=1, end_step=5) as batches,
        pytest.raises(DecodeError, match=r"pictures/train#2: damaged JPEG.*data\.bad_records=skip"),
    ):
        list(batches)


# Repeated sampling: data.repeat


class Counted(TrainTransform):
    """Counts pictures that are decoded, of all instances together."""

    lock, count = threading.Lock(), 0

    def decoded(self, record):
        if isinstance(record.image, bytes):
            with self.lock:
                Counted.count += 1
        return super().decoded(record)


@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_a_picture_is_decoded_once_for_its_crops(repeat):
    before = Counted.count
    take(train(Pictures(9), 8, transform=Counted((16, 16)), end_step=6, repeat=repeat))
    assert Counted.count - before == 6 * 8 // repeat


def test_repeated_crops_are_neighbours_each_with_numbers_of_its_own():
    source = Pictures(5)
    for step, batch in enumerate(take(train(source, 6, end_step=4, repeat=3))):
        for row in range(6):
            g = 6 * step + row
            record = source[example_index(3, g // 3, 5)]
            assert batch["label"][row] == batch["id"][row] == record.id
            expected = TRANSFORM(record, example_rng(3, g))["image"]
            np.testing.assert_array_equal(batch["image"][row], expected)
    assert len({image.tobytes() for image in batch["image"]}) == 6


@pytest.mark.parametrize("windows", [None, Windows(4, 8)])
@pytest.mark.parametrize(("n", "batch_size", "repeat"), [(10, 8, 4), (7, 6, 2), (12, 36, 3)])
def test_as_many_epochs_as_repetitions_show_every_picture_as_often(n, batch_size, repeat, windows):
    steps = -(-3 * n * repeat // batch_size)  # an epoch is n crops
    options = {"end_step": steps, "repeat": repeat, "windows": windows}
    got = labels(train(Pictures(n), batch_size, **options))[: 3 * n * repeat]
    for all_pictures in got.reshape(3, n * repeat):
        assert np.bincount(all_pictures, minlength=n).tolist() == [repeat] * n
    assert (got.reshape(-1, repeat) == got[::repeat, None]).all()


@pytest.mark.parametrize("windows", [None, Windows(3, 8)])
def test_repeated_batches_are_the_same_on_any_processes_and_from_any_step(windows):
    source = ReadInPieces(11, bad=(4,))
    options = {"batch_size": 8, "end_step": 6, "repeat": 2, "windows": windows}
    options["bad_records"] = "skip"
    whole = train(source, **options)
    expected = take(whole)
    assert_equal(take(train(source, start_step=4, **options)), expected[4:])
    skipped = 0
    for part in ([0, 1, 2, 3], [4, 5, 6, 7]):
        batches = train(source, positions=np.array(part), **options)
        assert_equal(take(batches), [{k: v[part] for k, v in b.items()} for b in expected])
        skipped += batches.skipped
    assert skipped == whole.skipped > 0
    assert whole.skipped % 2 == 0  # rows, not pictures


def test_worker_processes_repeat_crops_as_threads_do():
    options = {"end_step": 3, "repeat": 3, "windows": Windows(3, 8), "bad_records": "skip"}
    source = ReadInPieces(7, bad=(4,))
    expected, got = train(source, 12, **options), train(source, 12, workers=2, **options)
    assert_equal(take(got), take(expected))
    assert got.skipped == expected.skipped == 6


@pytest.mark.parametrize("positions", [[0, 1, 2], [1, 2], [0, 2, 1, 3], [1, 0]])
def test_a_process_with_part_of_a_pictures_crops_is_refused(positions):
    with pytest.raises(UserError, match=r"data\.repeat = 2: a process holds . rows.*divisor"):
        train(Pictures(3), 4, np.array(positions), repeat=2)


@dataclasses.dataclass
class ViewsAndMask:
    """Two crops of a picture and a mask of its own, drawn one after the other."""

    crop: TrainTransform = TRANSFORM

    @property
    def schema(self):
        image = self.crop.schema["image"]
        return {"image": image, "second": image, "mask": ArraySpec((3, 5), np.bool_)}

    def __call__(self, record, rng):
        first, second = (self.crop(record, rng)["image"] for _ in range(2))
        return {"image": first, "second": second, "mask": rng.random((3, 5)) < 0.5}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_may_make_several_arrays_of_a_record(workers):
    source = Pictures(6)
    (batch,) = take(train(source, transform=ViewsAndMask(), end_step=1, workers=workers))
    assert set(batch) == {"image", "second", "mask", "label", "id"}
    for g in range(4):
        index, rng = example_index(3, g, 6), example_rng(3, g)
        assert batch["label"][g] == batch["id"][g] == index
        for name in ("image", "second"):
            expected = TRANSFORM(source[index], rng)["image"]
            np.testing.assert_array_equal(batch[name][g], expected)
        np.testing.assert_array_equal(batch["mask"][g], rng.random((3, 5)) < 0.5)
    assert batch["mask"].dtype == bool


@pytest.mark.slow
def test_a_worker_holds_no_batch():
    def most_held(batch_size):
        """MB that are a worker's own, the most at any time."""
        transform = TrainTransform((224, 224))
        with train(Pictures(4), batch_size, transform=transform, workers=1, threads=1) as batches:
            next(batches)
            (worker,) = multiprocessing.active_children()
            memory = pathlib.Path(f"/proc/{worker.pid}/smaps_rollup")
            most, end = 0, time.monotonic() + 3  # in which it fills several batches
            taker = threading.Thread(target=lambda: [next(batches) for _ in range(3)])
            taker.start()
            while taker.is_alive() or time.monotonic() < end:
                lines = memory.read_text().splitlines()
                (kilobytes,) = [line.split()[1] for line in lines if line.startswith("Anonymous")]
                most = max(most, int(kilobytes))
                time.sleep(0.02)
        return most / 1024

    a_batch = 400 * 224 * 224 * 3 / 2**20
    assert most_held(400) - most_held(8) < a_batch / 4


def test_workers_share_a_file_where_there_are_none_in_memory(monkeypatch):
    expected = take(train(Pictures(6), end_step=3))
    monkeypatch.delattr(os, "memfd_create")
    assert_equal(take(train(Pictures(6), end_step=3, workers=1)), expected)


def test_workers_outlive_the_signals_of_a_jobs_end_but_not_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from test_pipeline import Pictures, train\n"
        "if __name__ == '__main__':\n"
        "    batches = train(Pictures(4), workers=1)\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    while True:\n"
        "        next(batches)\n"
        "        print('batch', flush=True)\n"
    )
    paths = [str(pathlib.Path(__file__).parent), *sys.path]
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        worker = int(parent.stdout.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        for _ in range(20):
            assert parent.stdout.readline() == "batch\n"
    finally:
        parent.kill()
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{worker}").exists()


def test_closing_does_not_wait_for_workers_whose_neighbour_died():
    with train(Pictures(6), batch_size=64, workers=2, prefetch=4) as batches:
        next(batches)
        first, second = multiprocessing.active_children()
        first.kill()
        with pytest.raises(concurrent.futures.process.BrokenProcessPool):
            list(batches)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert not second.is_alive()


def test_bad_record_stops_with_its_name():
    with (
        train(Pictures(6, bad=(2,)), end_step=3) as batches,
        pytest.raises(DecodeError, match=r"pictures/train#2: damaged JPEG.*data\.bad_records=skip"),
    ):
        list(batches)


def test_bad_records_are_replaced_by_the_next_good_one_and_counted(caplog):
    clean = labels(train(Pictures(6), end_step=6))
    batches = train(Pictures(6, bad=(2, 3)), end_step=6, bad_records="skip")
    with caplog.at_level("WARNING"):
        got = labels(batches)
    np.testing.assert_array_equal(got, np.where((clean == 2) | (clean == 3), 4, clean))
    assert batches.skipped == np.isin(clean, (2, 3)).sum() == 8
    logged = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(logged) == 2  # once per name
    assert_equal(
        take(train(Pictures(6, bad=(2, 3)), start_step=4, end_step=6, bad_records="skip")),
        take(train(Pictures(6, bad=(2, 3)), end_step=6, bad_records="skip"))[4:],
    )


def test_only_bad_records_is_an_error_even_when_skipping():
    with (
        train(Pictures(2, bad=(0, 1)), end_step=1, bad_records="skip") as batches,
        pytest.raises(DecodeError, match="none of the 2 records"),
    ):
        list(batches)


@pytest.mark.parametrize("n", [1, 7, 8, 9])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [0, 1, 2]]])
def test_evaluation_sees_every_record_once_in_as_many_batches_everywhere(n, parts):
    seen = []
    for part in parts:
        batches = take(
            eval_batches(Pictures(n), EvalTransform((8, 8)), batch_size=4, positions=np.array(part))
        )
        assert len(batches) == -(-n // 4)
        for batch in batches:
            assert batch["image"].shape == (len(part), 8, 8, 3)
            assert batch["weight"].dtype == np.float32
            real = batch["weight"] == 1
            seen += batch["label"][real].tolist()
            assert (batch["weight"][~real] == 0).all()
            assert (batch["label"][~real] == 0).all()
            np.testing.assert_array_equal(batch["id"], np.where(real, batch["label"], -1))
            assert (batch["image"][~real] == 0).all()
    assert sorted(seen) == list(range(n))


def test_evaluation_weighs_a_bad_record_nothing():
    options = {"batch_size": 4, "positions": np.arange(4)}
    batches = eval_batches(
        Pictures(6, bad=(2,)), EvalTransform((8, 8)), bad_records="skip", **options
    )
    weights = np.concatenate([b["weight"] for b in take(batches)])
    assert weights.tolist() == [1, 1, 0, 1, 1, 1, 0, 0]
    assert batches.skipped == 1
    with (
        eval_batches(Pictures(6, bad=(2,)), EvalTransform((8, 8)), **options) as batches,
        pytest.raises(DecodeError, match="pictures/train#2"),
    ):
        list(batches)


def test_closing_ends_all_threads():
    before = set(threading.enumerate())
    batches = train(Pictures(6), threads=3)
    next(batches)
    batches.close()
    batches.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": np.array([4])}, r"positions must lie in \[0, batch_size=4\)"),
        ({"positions": np.array([0.5])}, "positions must be integers"),
        ({"batch_size": 0, "positions": np.array([0])}, "batch_size=0"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        train(Pictures(3), **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_that_is_no_class_stops_the_run_with_its_record(workers):
    batches = train(Pictures(8), classes=7, start_step=0, end_step=4, workers=workers)
    with pytest.raises(LabelError, match=r"pictures/train#7.* 7"), batches:
        list(batches)


def test_an_evaluation_label_that_is_no_class_stops_the_run_even_if_pictures_may_be_skipped():
    transform = EvalTransform((16, 16))
    places = np.arange(4)
    batches = eval_batches(
        Pictures(8), transform, batch_size=4, positions=places, classes=7, bad_records="skip"
    )
    with pytest.raises(LabelError, match="pictures/train#7"), batches:
        list(batches)
