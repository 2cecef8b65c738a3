import importlib.machinery
import json
import sys
import types

from mae_jax.train.metrics import MetricsWriter, read_metrics


def test_each_write_is_one_json_line(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(10, {"train/loss": 0.5})
    writer.write(20, {"train/loss": float("nan"), "train/lr": 0.1})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 10, "train/loss": 0.5},
        {"step": 20, "train/loss": None, "train/lr": 0.1},
    ]


def test_a_resumed_run_drops_steps_that_run_again_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"step": 2')
    writer = MetricsWriter(tmp_path, 10)
    writer.write(15, {"train/loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(path)] == [5, 10, 15]
    assert read_metrics(path)[-1]["train/loss"] == 1.0


def test_tensorflow_is_kept_from_the_accelerator_before_its_writer_is_made(tmp_path, monkeypatch):
    done = []

    def module(name, **contents):
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    class Writer:
        def __init__(self, target):
            done.append("writer")

        def close(self):
            pass

    config = types.SimpleNamespace(
        set_visible_devices=lambda devices, kind: done.append((list(devices), kind))
    )
    module("tensorflow", config=config)
    writers = module("clu.metric_writers", AsyncWriter=Writer, SummaryWriter=Writer)
    monkeypatch.setattr("clu.metric_writers", writers, raising=False)
    MetricsWriter(tmp_path, 0).close()
    assert done[:2] == [([], "GPU"), ([], "TPU")]
    assert done[2:] == ["writer", "writer"]
