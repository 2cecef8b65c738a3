import jax
import pytest

from mae_jax import UserError
from mae_jax.bench import choices
from mae_jax.config import load_config
from mae_jax.tasks import create_task


def table(capsys):
    """Head and rows of what was printed, each row: in the encoder, depth, numbers."""
    head, _, *rows = capsys.readouterr().out.splitlines()
    return head, [(a, int(b), *map(float, rest)) for a, b, *rest in map(str.split, rows)]


SECONDS = {(True, 8): 12.0, (False, 8): 6.0, (False, 1): 2.0}  # by choice


class Timed:
    """A step that is not compiled, and takes `SECONDS`."""

    def __init__(self, config, mesh):
        self.batch_size = config.batch_size
        self.flops_per_image = create_task(config, 1000, None, mesh).train_flops_per_image
        self.seconds = SECONDS[config.mask.encoder_tokens, config.decoder.depth]

    def run(self, count):
        return count * self.seconds


@pytest.mark.parametrize(
    ("recipe", "by_flops", "paper"),
    # Of the whole model: 2.35 times for B, 3.2 for L (the paper: 3.3, table 1c), 3.6 for H.
    [("vit_b", 2.35, ()), ("vit_l", 3.2, (1.0, 2.8, 3.7)), ("vit_h", 3.6, (1.0, 3.5, 4.1))],
)
def test_choices_are_table_2s_with_ratios_of_time_and_flops(
    monkeypatch, capsys, recipe, by_flops, paper
):
    monkeypatch.setattr(choices, "Step", Timed)
    config = load_config(f"pretrain:{recipe}")
    config.batch_size = 48
    choices.main(config)
    head, rows = table(capsys)
    assert f"batch 48, bfloat16, {jax.device_count()} x " in head
    assert [row[:2] for row in rows] == [("yes", 8), ("no", 8), ("no", 1)]
    assert [row[2:4] for row in rows] == [(4, 1), (8, 2), (24, 6)]
    assert rows[0][4] == 1
    assert rows[1][4] == pytest.approx(by_flops, abs=0.05)
    assert rows[2][4] > rows[1][4]
    assert tuple(row[5] for row in rows if len(row) > 5) == paper


def test_a_model_of_another_size_has_no_number_of_the_papers(monkeypatch, capsys):
    monkeypatch.setattr(choices, "Step", Timed)
    config = load_config("pretrain:vit_l")
    config.batch_size, config.model.depth = 8, 2
    choices.main(config)
    assert {len(row) for row in table(capsys)[1]} == {5}


def test_a_task_without_masks_is_refused():
    with pytest.raises(UserError, match="task = 'finetune': mask tokens are of pretraining"):
        choices.main(load_config("finetune"))
