"""Running a function over a split: every example once, whatever the devices, stopped or not."""

import jax
import numpy as np
import pytest

from mae_jax import UserError
from mae_jax.data.record import DecodeError
from mae_jax.distributed.mesh import make_mesh
from mae_jax.evaluators import over_split
from mae_jax.evaluators.over_split import OverSplit, Parts, means, rows

VALUES = np.random.default_rng(0).normal(size=(29, 3)).astype(np.float32)
BROKEN = (4, 20)


class Loader:
    """Batches of `VALUES` as `pipeline.eval_batches` gives them; lists what it reads."""

    def __init__(self, source, run, broken=(), skip=False):
        self.source, self.run, self.broken, self.skip = source, run, broken, skip
        self.read = []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def __iter__(self):
        for start in range(0, len(self.source), self.run.batch_size):
            batch = {
                "x": np.zeros((self.run.batch_size, 3), np.float32),
                "weight": np.zeros(self.run.batch_size, np.float32),
            }
            for row in range(min(self.run.batch_size, len(self.source) - start)):
                index = self.source[start + row]
                self.read.append(index)
                if index in self.broken and not self.skip:
                    raise DecodeError(f"record {index} is broken")
                batch["weight"][row] = index not in self.broken
                batch["x"][row] = VALUES[index] * batch["weight"][row]
            yield batch


class Numbers:
    """A source whose records are their own numbers."""

    name, split, num_classes, class_names = "numbers", "all", None, None

    def __init__(self, numbers=range(29)):
        self.numbers = list(numbers)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return self.numbers[index]


def double(params, batch, number):
    return {"y": 2 * batch["x"] + params, "weight": batch["weight"]}


def total(params, batch, number):
    values = (batch["x"].sum(axis=1) + params) * batch["weight"]
    return {"sum": values.sum(), "weight": batch["weight"].sum()}


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_every_example_counts_once_on_any_number_of_devices(devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    good = np.setdiff1d(np.arange(29), BROKEN)
    run = OverSplit(double, mesh, 7)  # rounded up to 7, 9 and 8: the last batch is not full
    assert run.batch_size % devices == 0
    loader = Loader(Numbers(), run, BROKEN, skip=True)
    found = rows(run(np.float32(1), loader, examples=29, label=""))
    np.testing.assert_array_equal(found["y"], 2 * VALUES[good] + 1)
    assert loader.read == list(range(29))
    run = OverSplit(total, mesh, 7)
    loader = Loader(Numbers(), run, BROKEN, skip=True)
    metrics, count = means(run(np.float32(1), loader, examples=29, label=""))
    assert count == 27
    np.testing.assert_allclose(metrics["sum"], VALUES[good].sum(axis=1).mean() + 1, rtol=1e-6)


def test_a_split_of_which_nothing_can_be_decoded_is_told():
    run = OverSplit(total, make_mesh(), 8)
    loader = Loader(Numbers(range(8)), run, range(8), skip=True)
    with pytest.raises(UserError, match="no record of the split can be decoded"):
        means(run(np.float32(0), loader, examples=8, label=""))


def test_what_was_computed_before_a_broken_record_counts():
    run = OverSplit(double, make_mesh(), 8)
    results = run(np.float32(0), Loader(Numbers(), run, broken=(20,)), examples=29, label="")
    np.testing.assert_array_equal(next(results)["y"], 2 * VALUES[:8])
    np.testing.assert_array_equal(next(results)["y"], 2 * VALUES[8:16])
    with pytest.raises(DecodeError, match="record 20"):
        next(results)


@pytest.fixture
def compute(monkeypatch, tmp_path):
    """A function that gives all rows, and the numbers of the records read for them."""

    def function(numbers=range(29), key="one", broken=()):
        source, loaders = Numbers(numbers), []
        run = OverSplit(double, make_mesh(), 8)

        def batches(some, transform, **options):
            loaders.append(Loader(some, run, broken))
            return loaders[-1]

        monkeypatch.setattr(over_split, "eval_batches", batches)
        parts = Parts(tmp_path, {"key": key}, np.asarray(source.numbers))
        parts.compute(run, np.float32(0), source, None, label="")
        return parts.array("y"), [index for loader in loaders for index in loader.read]

    return function


def test_records_come_and_go_between_two_runs_and_others_are_not_read_again(compute, monkeypatch):
    monkeypatch.setattr(over_split, "BATCHES_PER_PART", 2)
    first = [n for n in range(29) if n not in (3, 11)]
    y, read = compute(first)
    np.testing.assert_array_equal(y, 2 * VALUES[first])
    assert read == first
    second = [n for n in range(29) if n not in (0, 17)]
    y, read = compute(second)
    np.testing.assert_array_equal(y, 2 * VALUES[second])
    assert read == [3, 11]
    y, read = compute(second[::-1])
    np.testing.assert_array_equal(y, 2 * VALUES[second[::-1]])
    assert read == []


def test_a_run_that_stopped_goes_on_with_the_batch_it_stopped_in(compute):
    with pytest.raises(DecodeError):
        compute(broken=(20,))
    y, read = compute()
    assert read == list(range(16, 29))
    np.testing.assert_array_equal(y, 2 * VALUES)


def test_rows_of_another_key_are_told_and_computed_again(compute, tmp_path):
    compute()
    assert Parts(tmp_path, {"key": "two"}, np.arange(29)).foreign == {"key"}
    assert compute(key="two")[1] == list(range(29))
    assert compute(key="two")[1] == []
    assert Parts(tmp_path, {"key": "two"}, np.arange(29)).foreign == set()


@pytest.mark.parametrize("devices", [1, 8])
def test_compiled_ahead_it_gives_the_same_and_nothing_is_compiled_later(devices, caplog):
    mesh = make_mesh(devices=jax.devices()[:devices])
    lazy, ahead = OverSplit(double, mesh, 8), OverSplit(double, mesh, 8)
    params = jax.ShapeDtypeStruct((), np.float32)
    program = ahead.compile(params, {"x": ((3,), np.float32), "weight": ((), np.float32)})
    assert program.memory_analysis().output_size_in_bytes > 0
    batches = list(Loader(Numbers(), lazy))
    expected = rows(lazy(np.float32(1), batches, examples=29, label=""))
    with jax.log_compiles():
        more = [{**batch, "id": np.arange(8)} for batch in batches]  # not asked for
        found = rows(ahead(np.float32(1), more, examples=29, label=""))
    np.testing.assert_array_equal(found["y"], expected["y"])
    assert "Compiling" not in caplog.text
    with pytest.raises(TypeError):  # it takes what it was compiled for
        list(ahead(np.zeros(3, np.float32), batches, examples=29, label=""))
