"""Makes the files beside it, once, from PyTorch, transformers and timm.

    PYTHONPATH=tests/parity python tests/interop/goldens/make.py

`official.pth`: random weights of a small MAE, in a training checkpoint as the official code writes
it. `expected.npz`: what transformers' ViTMAE computes from them (losses, predictions, mask, every
gradient, ten AdamW steps) and timm's features. `finetuned.pth`: random weights of a small
classifier on the mean token, as the official code writes it. `finetuned.npz`: the logits timm
computes from them. `types.pth`: tensors of every kind PyTorch stores.
"""

import argparse
import dataclasses
import pathlib
import tempfile

import numpy as np
import parity_models as parity
import torch

from mae_jax.interop.export import export_encoder
from mae_jax.interop.weights import to_official
from mae_jax.models.spec import ModelSpec
from mae_jax.train.optimizers import warmup_then

HERE = pathlib.Path(__file__).parent
D = ModelSpec((24, 24), 8, 3, 32, 2, 4, 16, 1, 2, "norm_pixel", 0.6)
STEPS = 10


def main() -> None:
    params = parity.random_params(D)
    tensors = to_official(params, D)
    state = {name: torch.tensor(x) for name, x in tensors.items()}
    args = argparse.Namespace(model="mae", lr=1e-3)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-3}]}
    checkpoint = {"model": state, "optimizer": optimizer, "epoch": 3, "scaler": {}, "args": args}
    torch.save(checkpoint, HERE / "official.pth")

    images, noise = parity.images_of(D, 2), parity.noise_of(D, 2)
    expected = {"images": images, "noise": noise}
    with tempfile.TemporaryDirectory() as folder:
        for target in ("pixel", "norm_pixel"):
            d = dataclasses.replace(D, target=target)
            model, _ = parity.transformers_mae(d, params, f"{folder}/{target}")
            loss, predictions, mask, grads = parity.theirs(model, images, noise)
            expected |= {f"loss/{target}": loss, "predictions": predictions, "mask": mask}
            expected |= {f"gradient/{target}/{name}": g for name, g in grads.items()}
        expected["adamw_losses"] = adamw_losses(model, images, noise)
        export_encoder(params, f"{folder}/timm", D, {})
        timm = parity.import_timm()
        vit = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
        with torch.no_grad():
            pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy())
            expected["timm_features"] = vit.forward_features(pixels).numpy()
    np.savez_compressed(HERE / "expected.npz", **expected)

    fine_tuned()
    matrix = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    torch.save(
        {
            "float": matrix,
            "transposed": matrix.T,
            "part": matrix[1:3, 2:5],
            "bfloat16": matrix.bfloat16(),
            "half": matrix.half(),
            "double": matrix.double(),
            "long": matrix.long(),
            "parameter": torch.nn.Parameter(matrix),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
        },
        HERE / "types.pth",
    )


def fine_tuned() -> None:
    """A classifier as fine-tuning leaves it, every parameter random, its positions included."""
    parity.import_timm()
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    model = VisionTransformer(**sizes, num_classes=5, global_pool="avg").eval()
    rng = np.random.default_rng(0)
    state = {
        name: torch.tensor(0.3 * rng.standard_normal(x.shape, np.float32))
        for name, x in model.state_dict().items()
    }
    model.load_state_dict(state)
    args = argparse.Namespace(model="vit", global_pool=True)
    checkpoint = {"model": state, "optimizer": {}, "epoch": 99, "scaler": {}, "args": args}
    torch.save(checkpoint, HERE / "finetuned.pth")
    images = parity.images_of(D, 2)
    with torch.no_grad():
        logits = model(torch.tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.savez_compressed(HERE / "finetuned.npz", images=images, logits=logits)


def adamw_losses(model: torch.nn.Module, images: np.ndarray, noise: np.ndarray) -> list[float]:
    """Losses of ten steps on the same batch, at the rates of `warmup_then`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = warmup_then("cosine", base_lr=2.56, batch_size=1, warmup_steps=3, total_steps=STEPS)
    pixels, noise = torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(noise)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        loss = model(pixel_values=pixels, noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
