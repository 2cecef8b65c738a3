"""The pretraining task: what a step of masked autoencoding does (paper section 3, table 8)."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import config as config_lib
from mae_jax import visualize
from mae_jax.data.preprocess import example_keys, normalize, random_flip
from mae_jax.data.sources import DecodeError, Source, open_source
from mae_jax.data.transforms import EvalTransform, TrainTransform
from mae_jax.distributed.mesh import batch_sharding, replicate, replicated
from mae_jax.distributed.sharding import gather_params, state_sharding
from mae_jax.interop.description import Description
from mae_jax.interop.export import export_encoder
from mae_jax.models import flops
from mae_jax.models.mae import create_mae
from mae_jax.models.masking import Masking, sample_masking
from mae_jax.train import optimizers
from mae_jax.train.state import Metrics, TrainState, apply_gradients, create_state, gradients

# Keys of evaluation masks and parameters must not collide with those of training steps.
_TRAIN, _EVAL, _INIT = 0, 1, 2


class Pretrain:
    """Masked autoencoding as pure functions of (state, batch).

    Args:
      config: a validated config.
      examples: size of the training split; sets the length of epochs.
      mesh: where steps run.
    """

    batch_fields = ("image",)  # labels are not looked at
    metric_names = ("loss", "grad_norm", "lr")

    def __init__(self, config: ConfigDict, examples: int, mesh: Mesh):
        self.total_steps = config_lib.total_steps(config, examples)
        self.batch_size = config.batch_size
        self.mesh = mesh
        self.model = create_mae(
            variant=config.model.variant,
            patch_size=config.model.patch_size,
            image_size=config_lib.image_size(config),
            channels=config.model.channels,
            width=config.model.width,
            depth=config.model.depth,
            heads=config.model.heads,
            decoder_width=config.decoder.width,
            decoder_depth=config.decoder.depth,
            decoder_heads=config.decoder.heads,
            target=config.target,
            dtype=jnp.dtype(config.compute_dtype),
            stacking=config.model.stacking,
            remat=config.model.remat,
        )
        self.mask_kind = config.mask.kind
        self.mask_ratio = config.mask.ratio
        self.mean = tuple(config.data.mean)
        self.std = tuple(config.data.std)
        self.flip = config.data.flip
        self.accumulate = config.optim.accumulate
        self.ema_decay = config.optim.ema
        self.schedule = optimizers.warmup_cosine(
            base_lr=config.optim.base_lr,
            batch_size=config.batch_size,
            warmup_steps=config_lib.warmup_steps(config, examples),
            total_steps=self.total_steps,
            min_lr=config.optim.min_lr,
        )
        self.optimizer = optimizers.adamw(
            self.schedule,
            b1=config.optim.b1,
            b2=config.optim.b2,
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            clip_norm=config.optim.clip_norm,
        )
        self._seed = config.seed

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images a step takes."""
        return (*self.model.encoder.image_size, self.model.encoder.channels)

    @property
    def train_flops_per_image(self) -> int:
        """Matrix-multiply FLOPs of one training step per image."""
        return flops.train_flops(flops.mae_forward_macs(self.model, self.mask_ratio))

    def _key(self, purpose: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self._seed), purpose)

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""
        images = jnp.zeros((1, *self.image_shape))
        masking = self.masks(jax.random.split(jax.random.key(0), 1))
        variables = self.model.init(self._key(_INIT), images, masking)
        return create_state(variables["params"], self.optimizer, keep_ema=self.ema_decay > 0)

    def masks(self, keys: jax.Array) -> Masking:
        """One mask per key [B]."""
        return sample_masking(self.mask_kind, keys, self.model.encoder.grid, self.mask_ratio)

    def _positions(self, count: int) -> jax.Array:
        positions = jnp.arange(count, dtype=jnp.int32)
        return jax.lax.with_sharding_constraint(positions, batch_sharding(self.mesh))

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        """One update on batch["image"] [B, H, W, C] uint8.

        Flips and masks depend on (seed, step, position in the global batch) only.
        """
        images = batch["image"]
        keys = example_keys(self._key(_TRAIN), state.step, self._positions(images.shape[0]))
        flip_keys, mask_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)  # [B] each
        examples = {"image": images, "flip_key": flip_keys, "mask_key": mask_keys}

        def loss_fn(params: Any, examples: dict) -> tuple[jax.Array, Metrics]:
            params = gather_params(params, self.mesh, self.model.encoder.dtype)
            x = examples["image"]
            if self.flip:
                x = random_flip(x, examples["flip_key"])
            x = normalize(x, self.mean, self.std)  # [B, H, W, C]
            output = self.model.apply({"params": params}, x, self.masks(examples["mask_key"]))
            return output.loss.mean(), {}

        grads, metrics = gradients(loss_fn, state.params, examples, self.accumulate)
        grads = jax.lax.with_sharding_constraint(grads, state_sharding(grads, self.mesh))
        metrics["grad_norm"] = optimizers.global_norm(grads)
        metrics["lr"] = self.schedule(state.step)
        return apply_gradients(state, grads, self.optimizer, self.ema_decay), metrics

    def eval_step(self, state: TrainState, batch: dict, index: jax.Array) -> Metrics:
        """Summed loss and count of batch number `index`; masks are the same in every evaluation.

        Args:
          batch: "image" [B, H, W, C] uint8 and "weight" [B], 0 for padding.
        """
        x = normalize(batch["image"], self.mean, self.std)
        keys = example_keys(self._key(_EVAL), index, self._positions(x.shape[0]))
        params = gather_params(state.best_params, self.mesh, self.model.encoder.dtype)
        output = self.model.apply({"params": params}, x, self.masks(keys))
        weight = batch["weight"]
        return {"loss": (output.loss * weight).sum(), "weight": weight.sum()}

    def reconstruct(self, state: TrainState, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Predictions [B, L, p*p*C] and masks [B, L] for images [B, H, W, C] uint8."""
        x = normalize(images, self.mean, self.std)
        keys = jax.random.split(self._key(_EVAL), images.shape[0])
        masking = self.masks(keys)
        output = self.model.apply({"params": state.best_params}, x, masking)
        return output.predictions, masking.mask

    @property
    def description(self) -> Description:
        """The model as other libraries need to know it."""
        encoder, decoder = self.model.encoder, self.model.decoder
        return Description(
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
            channels=encoder.channels,
            width=encoder.width,
            depth=encoder.depth,
            heads=encoder.heads,
            decoder_width=decoder.width,
            decoder_depth=decoder.depth,
            decoder_heads=decoder.heads,
            target=self.model.target,
            mask_ratio=self.mask_ratio,
            mean=self.mean,
            std=self.std,
        )

    def export(self, params: Any, directory: pathlib.Path, facts: dict[str, Any]) -> None:
        """Writes the encoder of host arrays `params` for others to load, with a card."""
        export_encoder(params, directory, self.description, facts)


class Reconstructions:
    """Draws what the model makes of a few fixed images.

    Args:
      images: [B, H, W, C] uint8.
      directory: receives `step_NNNNNNNN.png`.
    """

    def __init__(self, task: Pretrain, images: np.ndarray, mesh: Mesh, directory: pathlib.Path):
        self._task = task
        self._images = images
        self._mesh = mesh
        self._directory = directory
        self._reconstruct = jax.jit(task.reconstruct, out_shardings=replicated(mesh))

    def __call__(self, step: int, state: TrainState) -> None:
        """Writes the picture of `step`."""
        predictions, mask = self._reconstruct(state, replicate(self._images, self._mesh))
        if jax.process_index() != 0:
            return
        sheet = visualize.reconstruction_grid(
            self._images,
            np.asarray(predictions),
            np.asarray(mask),
            patch_size=self._task.model.encoder.patch_size,
            target=self._task.model.target,
            mean=self._task.mean,
            std=self._task.std,
        )
        visualize.save_png(sheet, self._directory / f"step_{step:08d}.png")


class PretrainData:
    """The two splits, each with its transform to the model's input.

    Raises:
      ValueError: missing or unprepared data, naming the field and the remedy.
    """

    def __init__(self, config: ConfigDict):
        size = config_lib.image_size(config)
        self.train: Source = open_source(
            config.data.name, config.data.dir or None, config.data.train_split
        )
        self.eval: Source = open_source(
            config.data.name, config.data.dir or None, config.data.eval_split
        )
        self.train_transform = TrainTransform(
            size=size,
            channels=config.model.channels,
            scale=tuple(config.data.scale),
            ratio=tuple(config.data.ratio),
            crop=config.data.crop,
        )
        self.eval_transform = EvalTransform(size=size, channels=config.model.channels)
        self._skip = config.data.bad_records == "skip"

    def eval_images(self, count: int) -> np.ndarray:
        """The first `count` images of the evaluation split: [count, H, W, C] uint8."""
        count = min(count, len(self.eval))
        # Spread over the split: neighbours are often of one class.
        indices = np.linspace(0, len(self.eval) - 1, count).astype(int)
        return np.stack([self._eval_image(int(index)) for index in indices])

    def _eval_image(self, index: int) -> np.ndarray:
        for i in range(len(self.eval)):
            try:
                return self.eval_transform(self.eval[(index + i) % len(self.eval)])
            except DecodeError:
                if not self._skip:
                    raise
        raise DecodeError(f"none of the {len(self.eval)} evaluation records can be decoded")
