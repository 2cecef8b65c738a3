import dataclasses

import numpy as np
import pytest

from mae_jax.bench import data as bench
from mae_jax.config import default_config
from mae_jax.data.randaugment import parse_randaugment
from mae_jax.data.record import Record
from mae_jax.data.transforms import TrainTransform


@pytest.mark.parametrize("workers", [0, 1])
def test_bench_prints_rates_and_truth_of_both_ways_beside_the_plain_one(
    monkeypatch, capsys, workers
):
    for name, value in {"ROUNDS": 2, "STEPS": 2, "COMPARED": 24}.items():
        monkeypatch.setattr(bench, name, value)
    config = default_config()
    config.batch_size, config.data.name, config.data.threads = 8, "demo", 2
    config.data.workers = workers
    config.model.image_size = (96,)
    bench.main(config)
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in lines[2:]}
    assert list(table) == ["exact", "fast", "gap", "decode", "plain"]
    assert all(min(row[:3]) > 0 for row in table.values())
    assert len(table.pop("decode")) == 3  # without pixels
    off, power = zip(*(row[3:] for row in table.values()), strict=True)
    assert max(off[0], off[2]) <= 0.15 < off[1] < 2.5
    assert abs(power[0] - 1) < 0.03 < abs(power[1] - 1)
    assert (off[3], power[3]) == (0, 1)


@pytest.mark.parametrize("spec", ["", "rand-m9-mstd0.5-inc1-n4"])
def test_plain_way_does_the_same_work(spec):
    randaugment = parse_randaugment(spec, (124, 116, 104)) if spec else None
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    options = {"size": (32, 32), "scale": (0.25, 0.25), "randaugment": randaugment}
    transforms = TrainTransform(**options), bench.Plain(**options)
    a, b = (t(Record(image, 0, "x"), np.random.default_rng(1))["image"] for t in transforms)
    np.testing.assert_array_equal(a, b)
    assert dataclasses.replace(transforms[1], randaugment=None).randaugment is None
