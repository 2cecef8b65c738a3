import re
import sys

import pytest

from mae_jax import UserError
from mae_jax.bench import peers, step
from mae_jax.config import load_config


@pytest.fixture
def config():
    config = load_config("quickstart")
    config.batch_size = 8
    config.model.depth = config.decoder.depth = 1
    return config


def test_both_are_timed_in_turns_on_the_same_batch(monkeypatch, capsys, config):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(step, "SECONDS_A_ROUND", 0.05)
    peers.main(config)
    head, _, theirs, ours = capsys.readouterr().out.splitlines()
    assert "batch 8, float32, torch " in head
    assert re.match(r"transformers, eager +[\d.]+ +1\.00  1\.00( 1\.00){4}$", theirs)
    assert re.match(r"mae_jax +[\d.]+ +[\d.]+  [\d.]+( [\d.]+){4}$", ours)


def test_what_cannot_be_compared_is_refused(monkeypatch, config):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config.target = "hog"
    with pytest.raises(UserError, match="predicts hog has no place in other programs"):
        peers.main(config)
    with pytest.raises(UserError, match="ViTMAE is for pretraining"):
        peers.main(load_config("finetune"))


def test_without_torch_the_extra_is_named(monkeypatch, config):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'pip install "mae_jax\[parity\]"'):
        peers.main(config)
