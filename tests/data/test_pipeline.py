import collections

import numpy as np
import pytest

from mae_jax.data.pipeline import eval_batches, example_index, train_batches
from mae_jax.data.record import DecodeError, Record


class Numbered:
    """Picture i is filled with i; the ones in `broken` cannot be decoded."""

    name, split, num_classes, class_names = "numbered", "train", None, None

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise DecodeError(f"numbered#{index}: broken")
        return Record(np.full((2, 2, 1), index, np.uint8), index, f"numbered#{index}")


class Draw:
    """Writes the record's number and one random byte."""

    shape = (1, 2, 1)

    def __call__(self, record, rng):
        byte = 0 if rng is None else int(rng.integers(256))
        return np.asarray([record.label, byte], np.uint8).reshape(self.shape)


def collect(count=10, broken=(), batch_size=4, positions=None, start=0, end=8, seed=3, **options):
    positions = np.arange(batch_size) if positions is None else np.asarray(positions)
    arguments = {"seed": seed, "batch_size": batch_size, "positions": positions, **options}
    with train_batches(
        Numbered(count, broken), Draw(), start_step=start, end_step=end, **arguments
    ) as batches:
        images = [batch["image"][:, 0, :, 0] for batch in batches]
        return np.stack(images), batches.skipped  # [steps, b, 2]


def test_every_epoch_shows_every_record_once_in_another_order():
    images, _ = collect(count=10, batch_size=4, end=10)
    stream = images[:, :, 0].ravel()
    epochs = stream.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_the_published_function_of_seed_and_place():
    images, _ = collect(count=7, batch_size=4, end=6, seed=5)
    expected = [example_index(5, g, 7) for g in range(24)]
    assert images[:, :, 0].ravel().tolist() == expected


def test_starting_in_the_middle_gives_the_same_batches():
    whole, _ = collect(end=9)
    rest, _ = collect(start=5, end=9)
    np.testing.assert_array_equal(rest, whole[5:])


@pytest.mark.parametrize(
    "options", [{"threads": 1}, {"threads": 3}, {"workers": 2}, {"prefetch": 1}]
)
def test_threads_and_processes_change_nothing(options):
    whole, _ = collect()
    np.testing.assert_array_equal(collect(**options)[0], whole)


def test_each_process_loads_its_rows_of_the_global_batch():
    whole, _ = collect(batch_size=6)
    part, _ = collect(batch_size=6, positions=[4, 1])
    np.testing.assert_array_equal(part, whole[:, [4, 1]])


def test_crops_differ_between_examples_epochs_and_seeds():
    images, _ = collect(count=10, batch_size=10, end=4)
    by_record = collections.defaultdict(list)
    for record, byte in images.reshape(-1, 2):
        by_record[record].append(byte)
    assert all(len(set(values)) > 1 for values in by_record.values())
    other, _ = collect(count=10, batch_size=10, end=4, seed=4)
    assert (images != other).any()


def test_a_data_set_smaller_than_the_batch_is_repeated():
    images, _ = collect(count=3, batch_size=8, end=3)
    counts = collections.Counter(images[:, :, 0].ravel().tolist())
    assert counts == {0: 8, 1: 8, 2: 8}


def test_without_shuffling_records_come_in_order():
    images, _ = collect(count=5, batch_size=5, end=2, shuffle=False)
    assert images[:, :, 0].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_record_stops_the_run_with_its_name(workers):
    with pytest.raises(Exception, match=r"numbered#6: broken"):
        collect(broken=(6,), workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_skipping_takes_the_next_record_and_counts(workers):
    clean, zero = collect(count=10, batch_size=5, end=4)
    images, skipped = collect(
        count=10, batch_size=5, end=4, broken=(6, 7), bad_records="skip", workers=workers
    )
    assert zero == 0
    assert skipped == 4  # two records in each of two epochs
    expected = np.where(np.isin(clean[:, :, 0], (6, 7)), 8, clean[:, :, 0])
    np.testing.assert_array_equal(images[:, :, 0], expected)
    np.testing.assert_array_equal(images[:, :, 1], clean[:, :, 1])


def test_when_no_record_can_be_decoded_skipping_ends():
    with pytest.raises(DecodeError, match="none of the 3 records"):
        collect(count=3, broken=(0, 1, 2), bad_records="skip")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_sees_every_record_exactly_once(processes):
    seen = []
    for process in range(processes):
        positions = np.arange(8).reshape(processes, -1)[process]
        with eval_batches(Numbered(21), Draw(), batch_size=8, positions=positions) as batches:
            collected = list(batches)
        assert len(collected) == 3
        for batch in collected:
            real = batch["weight"] == 1
            seen += batch["image"][real, 0, 0, 0].tolist()
            assert (batch["image"][~real] == 0).all()
    assert sorted(seen) == list(range(21))
