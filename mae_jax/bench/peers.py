"""How fast the training step is beside that of transformers' ViTMAE, in PyTorch on one device.

python -m mae_jax.bench peers --config=configs/pretrain.py:vit_b --config.batch_size=8
"""

import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax import config as config_lib
from mae_jax.bench.step import Step, open_mesh, rates_in_turns
from mae_jax.interop.export import hugging_face_config
from mae_jax.models.spec import ModelSpec

TORCH_DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # by JAX's platform


def main(config: ConfigDict) -> None:
    """Prints images/s of both, timed in turns, and how many times as fast as theirs ours is: the
    same model, batch and type of products, with AdamW, on pixels already on the device. On a GPU
    theirs is timed compiled (`torch.compile`), too."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise UserError(f'bench peers: {e}; pip install "mae_jax[parity]"') from e
    if config.task not in config_lib.MAE:
        raise UserError(f"task = {config.task!r}: ViTMAE is for pretraining")
    platform = jax.default_backend()
    if platform not in TORCH_DEVICES:
        raise UserError(
            f"bench peers: PyTorch has no {platform} here; JAX_PLATFORMS=cpu does without"
        )
    mesh = open_mesh(config, jax.devices()[:1])
    theirs = hugging_face_config(ModelSpec.from_config(config))
    model = transformers.ViTMAEConfig(**{k: v for k, v in theirs.items() if k != "torch_dtype"})
    device = TORCH_DEVICES[platform]
    ways = ("eager", "compiled") if device == "cuda" else ("eager",)
    steps = {f"transformers, {way}": TorchStep(config, model, device, way) for way in ways}
    steps["mae_jax"] = Step(config, mesh)
    rates = rates_in_turns([*steps.values()])  # [ways, rounds]
    print(
        f"{mesh.devices.flat[0].device_kind}, batch {config.batch_size}, {config.compute_dtype}, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, transformers "
        f"{transformers.__version__}; medians of {rates.shape[1]} rounds"
    )
    print("                        images/s  x first  in each round")
    for name, rate in zip(steps, rates, strict=True):
        ratios = rate / rates[0]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:22s} {np.median(rate):9.2f} {np.median(ratios):8.2f}  {each}")


class TorchStep:
    """A training step of transformers' ViTMAE, with a batch to do it on."""

    def __init__(self, config: ConfigDict, model: Any, device: str, way: str):
        import torch
        import transformers

        self.batch_size = config.batch_size
        self._model = transformers.ViTMAEForPreTraining(model).to(device).train()
        parameters = self._model.parameters()
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)
        shape = config.batch_size, model.num_channels, model.image_size, model.image_size
        self._images = torch.rand(shape, device=device)
        dtype = torch.bfloat16 if config.compute_dtype == "bfloat16" else None
        self._cast = torch.autocast(device, dtype=dtype, enabled=dtype is not None)
        self._forward = torch.compile(self._model) if way == "compiled" else self._model

    def run(self, count: int) -> float:
        """Seconds that so many steps take."""
        start = time.perf_counter()
        for _ in range(count):
            with self._cast:
                loss = self._forward(self._images).loss
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        loss.item()  # waits
        return time.perf_counter() - start
