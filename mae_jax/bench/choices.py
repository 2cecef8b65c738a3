"""What mask tokens outside the encoder and a shallow decoder save (paper table 2).

python -m mae_jax.bench choices --config=configs/pretrain.py:vit_l --config.batch_size=256
"""

import copy

import numpy as np
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax import config as config_lib
from mae_jax.bench.step import Step, open_mesh, rates_in_turns
from mae_jax.config_checks import validate

# Mask tokens in the encoder, blocks of the decoder.
CHOICES = ((True, 8), (False, 8), (False, 1))
# How many times as fast as the first: 128 TPU-v3 cores, TensorFlow (paper table 2).
OF_THE_PAPER = {"l": (1.0, 2.8, 3.7), "h": (1.0, 3.5, 4.1)}


def main(config: ConfigDict) -> None:
    """Prints images/s of each choice and how many times the first's that is, timed in turns, beside
    the ratio of their FLOPs and the paper's; mesh and all else as the config has them."""
    if config.task not in config_lib.MAE:
        raise UserError(f"task = {config.task!r}: mask tokens are of pretraining")
    configs = []
    for config.mask.encoder_tokens, config.decoder.depth in CHOICES:
        validate(config, starts=False)
        configs.append(copy.deepcopy(config))
    mesh = open_mesh(config)
    steps = [Step(each, mesh) for each in configs]
    rates = rates_in_turns(steps)  # [choices, rounds]
    ratios = np.median(rates / rates[0], axis=1)
    papers = OF_THE_PAPER.get(config.model.variant, ("",) * len(CHOICES))
    if config.model.width or config.model.depth:  # a model of another size
        papers = ("",) * len(CHOICES)
    model, device = config.model, mesh.devices.flat[0].device_kind
    print(
        f"ViT-{model.variant.upper()}/{model.patch_size} at {config_lib.image_size(config)}, "
        f"batch {config.batch_size}, {config.compute_dtype}, {mesh.size} x {device}; medians of "
        f"{rates.shape[1]} rounds"
    )
    print("mask tokens in the encoder  decoder  images/s  x first  by FLOPs  paper")
    for (tokens, depth), step, rate, ratio, paper in zip(
        CHOICES, steps, np.median(rates, axis=1), ratios, papers, strict=True
    ):
        by_flops = steps[0].flops_per_image / step.flops_per_image
        name = f"{'yes' if tokens else 'no':26}  {depth:7}"
        print(f"{name}  {rate:8.3f}  {ratio:7.2f}  {by_flops:8.2f}  {paper:>5}")
