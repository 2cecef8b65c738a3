"""Training a dVAE whose codes `target=token` predicts (DALL-E, arXiv 2102.12092, section 2.1).

What DALL-E's training has beside: a decoder of other blocks, a log-Laplace likelihood.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.augment.pixels import random_flip
from mae_jax.data.splits import Splits
from mae_jax.distributed.sharding import gather_params
from mae_jax.interop.tokenizer_file import TOKENIZER_FILE, write_tokenizer
from mae_jax.models import flops
from mae_jax.models.dvae import (
    DVAE,
    DVAEShape,
    decoder_macs,
    encoder_macs,
    map_pixels,
    unmap_pixels,
)
from mae_jax.models.spec import ModelSpec
from mae_jax.pictures.in_training import draw_pairs
from mae_jax.tasks.base import INIT, TRAIN, BaseTask
from mae_jax.train.loop import Action
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import Metrics, TrainState, create_state


class Tokenizer(BaseTask):
    """Pictures from codes drawn by a Gumbel softmax whose temperature falls; without labels."""

    metric_names = ("loss", "reconstruction", "kl", "grad_norm", "lr")
    fixed_positions: dict[str, np.ndarray] = {}  # noqa: RUF012  it has none

    def __init__(self, config: ConfigDict, examples: int, spec: ModelSpec, mesh: Mesh):
        super().__init__(config, examples, spec, None, mesh)
        del self.batch_schema["label"]
        self.shape = DVAEShape(*spec.tokenizer)
        self.model = DVAE(self.shape, spec.channels)
        self.kl, self.temperatures = config.dvae.kl, config.dvae.temperature
        picture = (self.shape, spec.channels, *spec.image_size)
        self.train_flops_per_image = flops.train_flops(
            encoder_macs(*picture) + decoder_macs(*picture)
        )

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""
        params = self.model.init(self.key(INIT), jnp.zeros((1, *self.image_shape)))["params"]
        return create_state(params, self.optimizer, keep_ema=self.ema_decay > 0)

    def temperature(self, step: jax.Array) -> jax.Array:
        """From the first to the last of `dvae.temperature`, by equal factors."""
        first, last = self.temperatures
        return first * (last / first) ** (step / self.total_steps)

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        """One update; flips and noise depend on (seed, step, position in the global batch) only."""
        images, temperature = batch["image"], self.temperature(state.step)
        keys = self.keys(TRAIN, state.step, images)
        flip_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)  # [B] each
        examples = {"image": images, "flip_key": flip_keys, "noise_key": noise_keys}

        def loss_fn(weights: Any, extra: dict, examples: dict) -> tuple[jax.Array, Metrics]:
            x = examples["image"]
            if self.flip:
                x = random_flip(x, examples["flip_key"])
            x = map_pixels(x.astype(jnp.float32) / 255)  # [B, H, W, C]
            logits = self.model.apply({"params": weights}, x, method="encode")  # [B, h, w, codes]
            draw = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))
            shares = jax.nn.softmax((logits + draw(examples["noise_key"])) / temperature)
            again = self.model.apply({"params": weights}, shares, method="decode")
            error = jnp.square((again - x) / 0.8).mean()  # of pixels in [0, 1]
            logs = jax.nn.log_softmax(logits)
            kl = (jnp.exp(logs) * (logs + jnp.log(self.shape.codes))).sum(axis=-1).mean()  # nats
            return error + self.kl * kl, {"reconstruction": error, "kl": kl}

        return self.update(state, loss_fn, examples, self.accumulate)

    def reconstruct(self, state: TrainState, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, C] uint8 from their most likely codes: pixels in [0, 1], codes [B, h,
        w]."""
        params = {"params": gather_params(state.weights, self.mesh, jnp.float32)}
        x = map_pixels(images.astype(jnp.float32) / 255)
        codes = self.model.apply(params, x, method="encode").argmax(axis=-1)
        shares = jax.nn.one_hot(codes, self.shape.codes)
        return unmap_pixels(self.model.apply(params, shares, method="decode")), codes

    def eval_step(self, state: TrainState, batch: dict, index: jax.Array) -> Metrics:
        """Summed squared error of pixels in [0, 1], shares of codes [codes], and count."""
        images, weight = batch["image"], batch["weight"]
        pixels, codes = self.reconstruct(state, images)
        error = jnp.square(pixels - images.astype(jnp.float32) / 255).mean(axis=(1, 2, 3))  # [B]
        each = jnp.broadcast_to(weight[:, None, None], codes.shape) / codes[0].size
        counts = jnp.bincount(codes.ravel(), each.ravel(), length=self.shape.codes)
        return {"loss": (error * weight).sum(), "codes": counts, "weight": weight.sum()}

    def scalars(self, means: dict[str, Any]) -> dict[str, float]:
        """The loss, how many codes were used, and the perplexity of their shares: as many would be
        used if all were used alike."""
        shares = means["codes"]
        used = shares[shares > 0]
        perplexity = np.exp(-(used * np.log(used)).sum())
        return {"loss": means["loss"], "codes_used": len(used), "perplexity": perplexity}

    def actions(
        self, config: ConfigDict, data: Splits, writer: MetricsWriter, workdir: epath.Path
    ) -> list[Action]:
        """Pictures beside what their codes give."""
        draw = draw_pairs(self, data, config.pictures.count, workdir / "reconstructions")
        return [Action("pictures", config.pictures.every, draw, draw.compile)]

    def export(self, state: TrainState, directory: epath.Path, facts: dict[str, Any]) -> None:
        """Writes the file that `tokenizer=` reads."""
        write_tokenizer(state.weights, directory / TOKENIZER_FILE)
