"""The order of training: each record once an epoch, whatever is read together."""

import collections
import pickle
import threading
import time

import numpy as np
import pytest
from test_pipeline import Pictures, labels, train

from mae_jax.data.order import WindowReader, Windows, example_index
from mae_jax.data.pipeline import eval_batches
from mae_jax.data.record import DecodeError, Record, Selection
from mae_jax.data.transforms import EvalTransform


class Counting(Pictures):
    """Pictures read many at once; counts what is asked of it."""

    def __init__(self, n, **options):
        super().__init__(n, **options)
        self.reads, self.singles, self.lock = [], 0, threading.Lock()

    def __getitem__(self, i):
        with self.lock:
            self.singles += 1
        return super().__getitem__(i)

    def read(self, start, stop):
        with self.lock:
            self.reads.append((start, stop))
        time.sleep(0.001)  # so that others ask meanwhile
        return {i: super(Counting, self).__getitem__(i) for i in range(start, stop)}

    def __getstate__(self):
        return vars(self) | {"lock": None}

    def __setstate__(self, state):
        vars(self).update(state, lock=threading.Lock())


def test_the_shuffle_of_earlier_versions_is_kept():
    found = [example_index(0, g, 1000) for g in (0, 1, 2, 999, 1000, 123456)]
    assert found == [233, 815, 962, 157, 297, 268]
    found = [example_index(2**40, g, 1281167) for g in (0, 5, 10**9)]
    assert found == [87506, 511957, 1216535]


@pytest.mark.parametrize("n", [1, 2, 65, 402])
@pytest.mark.parametrize("batch_size", [1, 12, 300])
def test_every_epoch_is_every_record_once(n, batch_size):
    for size, pool in ((1, 1), (3, 10**6), (64, 50)):
        windows = Windows(size, pool)
        for epoch in (0, 7):
            order = [windows.index(5, epoch * n + i, n, batch_size) for i in range(n)]
            assert sorted(order) == list(range(n)), (size, pool, epoch)


def test_orders_differ_between_epochs_and_seeds():
    windows = Windows(8, 64)
    orders = {
        tuple(windows.index(seed, epoch * 100 + i, 100, 16) for i in range(100))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_a_process_needs_the_windows_of_its_rows_alone():
    n, batch_size, windows = 16 * 600, 32, Windows(16, 512)
    used = [collections.Counter(), collections.Counter()]
    for g in range(n):
        used[g % batch_size // 16][windows.index(1, g, n, batch_size) // 16] += 1
    # 32 lanes end in mid-window, where one process may end as well; others are of one process.
    assert sum(len(own) for own in used) <= 600 + 1


def test_examples_of_far_windows_are_mixed():
    n, windows = 16 * 600, Windows(16, 512)
    order = np.array([windows.index(1, g, n, 32) for g in range(n)]).reshape(-1, 32)
    assert np.mean([len(np.unique(batch // 16)) for batch in order]) > 28  # in file order: 2
    # The mean of a batch strays as that of a batch drawn at random does, and half as much again.
    assert order.mean(axis=1).std() < 1.5 * n / np.sqrt(12 * 32)


def options(workers=0):
    return {"windows": Windows(8, 48), "workers": workers, "threads": 3}


@pytest.mark.parametrize("order", [{}, {"windows": Windows(8, 48)}])
def test_any_number_of_processes_sees_the_same_sequence(order):
    """As on 4 processes, then 2, 1 and 4 again, restarted at steps 5, 9 and 14."""
    source, batch_size = Pictures(90), 12
    options = {"batch_size": batch_size, "threads": 1, **order}
    with train(source, end_step=20, **options) as whole:
        expected = np.stack([batch["id"] for batch in whole])
    seen = []
    for processes, start, end in ((4, 0, 5), (2, 5, 9), (1, 9, 14), (4, 14, 20)):
        steps = {"start_step": start, "end_step": end}
        shares = np.split(np.arange(batch_size), processes)
        rows = [list(train(source, positions=own, **steps, **options)) for own in shares]
        for parts in zip(*rows, strict=True):
            seen.append(np.concatenate([part["id"] for part in parts]))
    np.testing.assert_array_equal(seen, expected)
    assert sorted(expected.ravel()[:180]) == sorted([*range(90)] * 2)


def test_a_window_is_read_once_by_all_threads():
    source = Counting(96)
    got = labels(train(source, batch_size=12, end_step=8, **options()))
    assert sorted(got) == list(range(96))
    assert source.singles == 0
    assert len(source.reads) <= 12 + 12  # windows, and the ends of 12 lanes
    assert all(stop - start == 8 for start, stop in source.reads)


def test_workers_give_the_same_rows_as_threads():
    threads = labels(train(Counting(96), batch_size=12, end_step=8, **options()))
    workers = labels(train(Counting(96), batch_size=12, end_step=8, **options(workers=2)))
    np.testing.assert_array_equal(threads, workers)


def test_a_reader_holds_no_more_windows_than_it_may():
    source = Counting(300)
    reader = WindowReader(source, size=10, capacity=5)
    for index in np.random.default_rng(0).permutation(300):
        assert reader[int(index)].label == index
        assert reader.kept <= 50
    assert source.singles == 0
    assert pickle.loads(pickle.dumps(reader))[7].label == 7


def test_a_record_asked_for_again_is_read_again():
    source = Counting(20)
    reader = WindowReader(source, size=10, capacity=5)
    assert [reader[i].label for i in (3, 3, 4, 3)] == [3, 3, 4, 3]
    assert source.reads == [(0, 10)] * 3


def test_a_damaged_record_is_the_only_one_missed():
    class Damaged(Counting):
        def read(self, start, stop):
            return {i: r for i, r in super().read(start, stop).items() if i != 13}

        def __getitem__(self, i):
            if i == 13:
                raise DecodeError("record 13 is damaged")
            return super().__getitem__(i)

    reader = WindowReader(Damaged(20), size=10, capacity=5)
    assert [reader[i].label for i in (12, 14)] == [12, 14]
    with pytest.raises(DecodeError, match="record 13"):
        reader[13]
    assert reader[15].label == 15


def test_a_failing_read_is_everybodys_error_and_tried_again():
    class Failing(Counting):
        def read(self, start, stop):
            if not self.reads:
                self.reads.append(0)
                raise OSError("away")
            return super().read(start, stop)

    reader = WindowReader(Failing(20), size=10, capacity=5)
    with pytest.raises(OSError, match="away"):
        reader[3]
    record = reader[3]
    assert record == Record(record.image, 3, "pictures/train#3", id=3)


def test_evaluation_reads_windows_in_order():
    source, sizes = Counting(50), {"batch_size": 24, "positions": np.arange(12, 24)}
    with eval_batches(source, EvalTransform((16, 16)), threads=2, **sizes) as batches:
        ids = np.concatenate([batch["id"] for batch in batches])
    assert ids.tolist() == [*range(12, 24), *range(36, 48), *[-1] * 12]
    assert (source.singles, len(source.reads)) == (0, 2)


def test_a_selection_reads_what_lies_side_by_side():
    some = Selection(Counting(50), np.array([3, 4, 5, 6, 20, 30]))
    assert {i: record.label for i, record in some.read(1, 4).items()} == {1: 4, 2: 5, 3: 6}
    assert some.read(2, 6) == {}
