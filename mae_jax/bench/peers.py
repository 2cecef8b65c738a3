"""How fast the training step is beside that of transformers' ViTMAE, in PyTorch on one device.

python -m mae_jax.bench peers --config=configs/pretrain.py:vit_b --config.batch_size=8
"""

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Iterator
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
    same model, batch and type of products, with AdamW, on pixels already on the device. Each has a
    process of its own, as where it is used. On a GPU theirs is timed compiled (`torch.compile`),
    too."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'bench peers: no {package} here; pip install "mae_jax[parity]"')
    if config.task not in config_lib.MAE:
        raise UserError(f"task = {config.task!r}: ViTMAE is for pretraining")
    platform = jax.default_backend()
    if platform not in TORCH_DEVICES:
        raise UserError(
            f"bench peers: PyTorch has no {platform} here; JAX_PLATFORMS=cpu does without"
        )
    mesh = open_mesh(config, jax.devices()[:1])
    model = hugging_face_config(ModelSpec.from_config(config))
    device, of = TORCH_DEVICES[platform], (config.batch_size, config.compute_dtype)
    ways = ("eager", "compiled") if device == "cuda" else ("eager",)
    steps = {f"transformers, {way}": Peer(model, *of, device, way) for way in ways}
    steps["mae_jax"] = Step(config, mesh)
    rates = rates_in_turns([*steps.values()])  # [ways, rounds]
    torch, transformers = map(importlib.metadata.version, ("torch", "transformers"))
    print(
        f"{mesh.devices.flat[0].device_kind}, batch {config.batch_size}, {config.compute_dtype}, "
        f"torch {torch}, transformers {transformers}; medians of {rates.shape[1]} rounds"
    )
    print("                        images/s  x first  in each round")
    for name, rate in zip(steps, rates, strict=True):
        ratios = rate / rates[0]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:22s} {np.median(rate):9.2f} {np.median(ratios):8.2f}  {each}")


class Peer:
    """A training step of transformers' ViTMAE in a process that lives as long as this one."""

    def __init__(self, model: dict[str, Any], batch_size: int, dtype: str, device: str, way: str):
        self.batch_size = batch_size
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        work = theirs, model, batch_size, dtype, device, way
        pages = os.environ.pop("GLIBC_TUNABLES", None)  # of `cli`; PyTorch is no faster by them
        context.Process(target=_run_steps, args=work, daemon=True).start()
        if pages is not None:
            os.environ["GLIBC_TUNABLES"] = pages
        theirs.close()

    def run(self, count: int) -> float:
        """Seconds that so many steps take; EOFError: it died, its output tells why."""
        self._pipe.send(count)
        return self._pipe.recv()


def _run_steps(
    pipe: Any, model: dict[str, Any], batch_size: int, dtype: str, device: str, way: str
) -> None:
    import torch
    import transformers

    config = transformers.ViTMAEConfig(**{k: v for k, v in model.items() if k != "torch_dtype"})
    model = transformers.ViTMAEForPreTraining(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    shape = batch_size, config.num_channels, config.image_size, config.image_size
    images = torch.rand(shape, device=device)
    bfloat16 = torch.bfloat16 if dtype == "bfloat16" else None
    cast = torch.autocast(device, dtype=bfloat16, enabled=bfloat16 is not None)
    forward = torch.compile(model) if way == "compiled" else model

    def counts() -> Iterator[int]:
        with contextlib.suppress(EOFError):  # whoever asked is gone
            while True:
                yield pipe.recv()

    for count in counts():
        start = time.perf_counter()
        for _ in range(count):
            with cast:
                loss = forward(images).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits
        pipe.send(time.perf_counter() - start)
