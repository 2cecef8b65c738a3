import dataclasses

import numpy as np
import pytest

from mae_jax.bench import data as bench
from mae_jax.config import default_config
from mae_jax.data.randaugment import parse_randaugment
from mae_jax.data.record import Record
from mae_jax.data.transforms import TrainTransform


@pytest.fixture
def config(monkeypatch):
    for name, value in {"ROUNDS": 2, "STEPS": 1, "COMPARED": 8}.items():
        monkeypatch.setattr(bench, name, value)
    config = default_config()
    config.batch_size, config.data.name, config.data.threads = 8, "demo", 2
    config.model.image_size = (96,)
    return config


def test_bench_prints_rates_ratio_and_pixel_difference(config, capsys):
    bench.main(config)
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert float(lines["mae_jax"][0]) > 0
    assert float(lines["plain"][2]) > 0
    assert float(lines["ratio"][0]) > 0
    assert 0 < float(lines["pixels"][0]) < 1.5


@pytest.mark.parametrize("spec", ["", "rand-m9-mstd0.5-inc1-n4"])
def test_plain_pipeline_does_the_same_work(spec):
    randaugment = parse_randaugment(spec, (124, 116, 104)) if spec else None
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    transform = TrainTransform((32, 32), scale=(0.25, 0.25), ratio=(1.0, 1.0))  # 32 px: no resize
    transform = dataclasses.replace(transform, randaugment=randaugment)
    a = transform(Record(image, 0, "x"), np.random.default_rng(1))
    b = bench.plain_transform(Record(image, 0, "x"), transform, np.random.default_rng(1))
    np.testing.assert_array_equal(a, b)
