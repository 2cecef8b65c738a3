"""Linear probing: a linear classifier on frozen features (paper appendix A.1, table 10)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import config as config_lib
from mae_jax.augment.pixels import random_flip
from mae_jax.data.record import ArraySpec
from mae_jax.data.splits import Splits
from mae_jax.distributed.sharding import gather_params
from mae_jax.evaluators.feature_cache import CachedFeatures
from mae_jax.interop.export import export_encoder
from mae_jax.models import flops
from mae_jax.models.classifier import (
    BATCH_NORM_EPS,
    absorb_batch_norm,
    classification_sums,
    linear_head,
    pool_tokens,
    probe_params,
)
from mae_jax.models.patches import normalize
from mae_jax.models.spec import ModelSpec
from mae_jax.tasks.base import INIT, TRAIN, BaseTask, how_computed
from mae_jax.train.state import Metrics, TrainState, create_state

BATCH_NORM_MOMENTUM = 0.1  # as PyTorch counts it: the share of the new statistics


class LinearProbe(BaseTask):
    """Batch norm without affine and a linear layer on frozen features.

    Where nothing random is asked of the pixels (`data.crop` centre, `data.flip` off), the features
    are computed once and kept, and steps take them in place of images.
    """

    def __init__(self, config: ConfigDict, examples: int, spec: ModelSpec, mesh: Mesh):
        # Positions are parameters: those of the weights, interpolated to this image size.
        encoder = spec.encoder(position_params=True, **how_computed(config))
        super().__init__(config, examples, spec, encoder, mesh)
        self.pool = config.head.pool
        self.init_std = config.head.init_std
        self.norm_group = config_lib.norm_group(config)
        self.cached = config.data.crop == "centre" and not config.data.flip
        head = forward = spec.width * spec.classes
        if self.cached:
            del self.batch_schema["image"]
            self.batch_schema["feature"] = ArraySpec((spec.width,), np.float32)
        else:
            forward += flops.encoder_forward_macs(encoder)
        self.train_flops_per_image = flops.train_flops(forward, head)

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""
        width, classes = self.spec.width, self.spec.classes
        encoder_key, head_key = jax.random.split(self.key(INIT))
        images = jnp.zeros((1, *self.image_shape))
        head = {
            "kernel": self.init_std * jax.random.normal(head_key, (width, classes)),
            "bias": jnp.zeros(classes),
        }
        return create_state(
            {"head": head},
            self.optimizer,
            keep_ema=False,
            frozen={"encoder": self.encoder.init(encoder_key, images)["params"]},
            extra={"statistics": {"mean": jnp.zeros(width), "var": jnp.ones(width)}},
        )

    def features(self, frozen: Any, images: jax.Array) -> jax.Array:
        """What the head sees of images [B, H, W, C] uint8, before batch norm: [B, D] float32."""
        params = gather_params(frozen["encoder"], self.mesh, self.encoder.dtype)
        tokens = self.encoder.apply({"params": params}, normalize(images, self.mean, self.std))
        return pool_tokens(tokens, self.pool)

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        """One update: the encoder in `optim.accumulate` parts, batch norm and head on the whole."""
        if self.cached:
            x = batch["feature"]
        else:
            images = batch["image"]
            if self.flip:
                images = random_flip(images, self.keys(TRAIN, state.step, images))
            x = in_parts(lambda part: self.features(state.frozen, part), images, self.accumulate)
        x, statistics = self.normalise_groups(x, state.extra["statistics"])

        def loss_fn(weights: Any, extra: dict, examples: dict) -> tuple[jax.Array, Metrics]:
            # Normalised already, over more examples than one device has.
            logits = linear_head(weights["head"], examples["x"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples["label"])
            return losses.mean(), {}

        examples = {"x": x, "label": batch["label"]}
        state, metrics = self.update(state, loss_fn, examples, parts=1)
        return state.replace(extra={"statistics": statistics}), metrics

    def normalise_groups(self, x: jax.Array, running: dict) -> tuple[jax.Array, dict]:
        """Batch norm of x [B, D] float32 over groups of neighbours in the global batch.

        Running statistics, "mean" [D] and "var" [D] (unbiased, as in PyTorch), move to the mean
        over groups, where the reference keeps those of its first GPU.
        """
        size = self.norm_group
        groups = x.reshape(-1, size, x.shape[1])  # [G, g, D]
        mean = groups.mean(axis=1, keepdims=True)
        var = jnp.square(groups - mean).mean(axis=1, keepdims=True)
        normalised = (groups - mean) * jax.lax.rsqrt(var + BATCH_NORM_EPS)
        new = {"mean": mean.mean(axis=(0, 1)), "var": var.mean(axis=(0, 1)) * size / (size - 1)}
        moved = jax.tree.map(lambda old, now: old + BATCH_NORM_MOMENTUM * (now - old), running, new)
        return normalised.reshape(x.shape), moved

    def eval_step(self, state: TrainState, batch: dict, index: jax.Array) -> Metrics:
        """Summed loss, top-1 and top-5 hits, and count."""
        x = batch["feature"] if self.cached else self.features(state.frozen, batch["image"])
        head = absorb_batch_norm(state.params["head"], state.extra["statistics"])
        return classification_sums(linear_head(head, x), batch["label"], batch["weight"])

    def inputs(self, data: Splits, state: TrainState, workdir: epath.Path) -> Any:
        """Where batches come from: the pixels, or features computed once from them."""
        if not self.cached:
            return data
        return CachedFeatures(self, data, state.frozen, workdir / "features")

    def export(self, state: TrainState, directory: epath.Path, facts: dict[str, Any]) -> None:
        """As for any task, batch norm absorbed into the head."""
        weights = jax.tree.map(np.asarray, probe_params(state.weights, state.extra["statistics"]))
        export_encoder(weights, directory, self.spec, facts)


def in_parts(function: Callable[[jax.Array], jax.Array], x: jax.Array, parts: int) -> jax.Array:
    """`function(x)`, of rows [B, ...] -> [B, ...], in so many parts of rows a, a + parts, a + 2 *
    parts, ... so that a batch split over devices stays where it is."""
    rows = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    y = jax.lax.map(function, jnp.swapaxes(rows, 0, 1))  # [parts, B / parts, ...]
    return jnp.swapaxes(y, 0, 1).reshape(x.shape[0], *y.shape[2:])
