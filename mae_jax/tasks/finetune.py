"""Fine-tuning, partial or whole, and training from scratch (paper tables 9, 11, section 4.3)."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import config as config_lib
from mae_jax.augment.mixing import mix, random_erasing, soft_targets
from mae_jax.augment.pixels import example_keys, random_flip
from mae_jax.data.splits import Splits
from mae_jax.distributed.mesh import batch_sharding
from mae_jax.distributed.sharding import gather_params
from mae_jax.models import flops
from mae_jax.models.classifier import classification_sums
from mae_jax.models.patches import normalize
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import drop_path_scale
from mae_jax.pictures.in_training import draw_augmentations, draw_predictions
from mae_jax.tasks.base import INIT, MIX, TRAIN, BaseTask, how_computed, how_trained
from mae_jax.train import optimizers
from mae_jax.train.loop import Action
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import Metrics, TrainState, create_state, split


class Finetune(BaseTask):
    """Classification as pure functions of (state, batch)."""

    decays = staticmethod(optimizers.decays_in_fine_tuning)

    def __init__(self, config: ConfigDict, examples: int, spec: ModelSpec, mesh: Mesh):
        depth, blocks = spec.depth, config.trainable_blocks
        self.trainable_blocks = depth if blocks == -1 else blocks
        frozen = depth - math.ceil(self.trainable_blocks)
        build = functools.partial(
            spec.classifier, head_std=config.head.init_std, frozen_blocks=frozen
        )
        self.model = build(**how_computed(config))
        self.trained = build(**how_trained(config, mesh))
        super().__init__(config, examples, spec, self.model.encoder, mesh)
        self.drop_path = config.model.drop_path
        self.augment = config.augment.copy_and_resolve_references()
        self.mix_group = config_lib.mix_group(config)
        layer_decay = optimizers.scale_by_layer(depth, config.optim.layer_decay)
        self.optimizer = optax.chain(self.optimizer, layer_decay)
        forward = trained = flops.encoder_forward_macs(self.encoder)
        if self.trainable_blocks < depth:
            one_block = flops.stack_macs(1 + math.prod(spec.grid), spec.width, 1)
            trained = round(self.trainable_blocks * one_block)
        self.train_flops_per_image = flops.train_flops(forward, trained)

    def is_trainable(self, path: str) -> bool:
        """Whether a parameter is trained: the last blocks and what follows them, or everything."""
        depth, blocks = self.encoder.depth, self.trainable_blocks
        if blocks == depth or not path.startswith("encoder/") or path.startswith("encoder/norm"):
            return True
        block = re.match(r"encoder/blocks/(\d+)/(\w+)/", path)
        if block is None:  # patch embedding, class token, positions
            return False
        index, part = int(block[1]), block[2]
        if blocks == 0.5:  # the MLP half of the last block
            return index == depth - 1 and part in ("norm2", "mlp")
        return index >= depth - blocks

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""
        variables = self.model.init(self.key(INIT), jnp.zeros((1, *self.image_shape)))
        params, frozen = split(variables["params"], self.is_trainable)
        return create_state(params, self.optimizer, keep_ema=self.ema_decay > 0, frozen=frozen)

    def augmented(self, batch: dict, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images [B, H, W, C] float32, normalised; targets [B, classes]; keys [B] for the model: a
        function of (seed, step, position in the global batch)."""
        images, augment = batch["image"], self.augment
        keys = self.keys(TRAIN, step, images)
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)  # [B, 3]
        if self.flip:
            images = random_flip(images, keys[:, 0])
        images = normalize(images, self.mean, self.std)
        if augment.erasing:
            images = random_erasing(images, keys[:, 1], augment.erasing)
        targets = soft_targets(batch["label"], self.model.classes, augment.smoothing)
        if augment.mixup or augment.cutmix:
            groups = jnp.arange(images.shape[0] // self.mix_group, dtype=jnp.int32)
            images, targets = mix(
                images,
                targets,
                example_keys(self.key(MIX), step, groups),
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                probability=augment.mix_probability,
                switch_probability=augment.mix_switch,
                group=self.mix_group,
            )
        rows = batch_sharding(self.mesh)
        images, targets = jax.lax.with_sharding_constraint((images, targets), rows)
        return images, targets, keys[:, 2]

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        """One update on batch["image"] [B, H, W, C] uint8 and batch["label"] [B] int32."""
        images, targets, keys = self.augmented(batch, state.step)

        def loss_fn(weights: Any, extra: dict, examples: dict) -> tuple[jax.Array, Metrics]:
            path_scale = None
            if self.drop_path:
                path_scale = drop_path_scale(examples["key"], self.encoder.depth, self.drop_path)
            logits = self.trained.apply({"params": weights}, examples["image"], path_scale)
            return optax.softmax_cross_entropy(logits, examples["target"]).mean(), {}

        examples = {"image": images, "target": targets, "key": keys}
        return self.update(state, loss_fn, examples, self.accumulate)

    def logits(self, state: TrainState, images: jax.Array) -> jax.Array:
        """Logits [B, classes] float32 of images [B, H, W, C] uint8."""
        params = gather_params(state.weights, self.mesh, self.encoder.dtype)
        return self.model.apply({"params": params}, normalize(images, self.mean, self.std))

    def eval_step(self, state: TrainState, batch: dict, index: jax.Array) -> Metrics:
        """Summed loss, top-1 and top-5 hits, and count."""
        logits = self.logits(state, batch["image"])
        return classification_sums(logits, batch["label"], batch["weight"])

    def probabilities(self, state: TrainState, images: jax.Array) -> jax.Array:
        """Softmax over classes [B, classes] of images [B, H, W, C] uint8."""
        return jax.nn.softmax(self.logits(state, images))

    def draw_inputs(self, data: Splits, workdir: epath.Path) -> None:
        """Training images as the model sees them."""
        draw_augmentations(self, data, workdir / "augmentations.png")

    def actions(
        self, config: ConfigDict, data: Splits, writer: MetricsWriter, workdir: epath.Path
    ) -> list[Action]:
        """Pictures of predictions."""
        pictures = draw_predictions(self, data, config.pictures.count, workdir / "predictions")
        return [Action("pictures", config.pictures.every, pictures, pictures.compile)]
