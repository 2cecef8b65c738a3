"""The pretraining task: what a step of masked autoencoding does (paper section 3, table 8)."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax.augment.pixels import random_flip
from mae_jax.config import FIELDS
from mae_jax.data.mask_file import read_masks
from mae_jax.data.splits import Splits
from mae_jax.distributed.mesh import place
from mae_jax.distributed.sharding import gather_params, shardings_of
from mae_jax.evaluators.online_probe import Probe
from mae_jax.interop.tokenizer_file import read_tokenizer
from mae_jax.models import flops
from mae_jax.models.inference import reconstruct
from mae_jax.models.masking import Masking, choose_masking
from mae_jax.models.patches import normalize, patchify
from mae_jax.models.spec import ModelSpec
from mae_jax.pictures.in_training import draw_reconstructions
from mae_jax.storage.processes import in_every_process
from mae_jax.tasks.base import EVAL, INIT, TRAIN, BaseTask, how_computed, how_trained
from mae_jax.train.loop import Action
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import Metrics, TrainState, create_state, split


class Pretrain(BaseTask):
    """Masked autoencoding as pure functions of (state, batch); labels are not looked at."""

    def __init__(self, config: ConfigDict, examples: int, spec: ModelSpec, mesh: Mesh):
        self.own_masks = read_masks(config.mask.file, spec.grid) if config.mask.file else None
        if self.own_masks is not None:
            spec = dataclasses.replace(spec, mask_ratio=_ratio_of(self.own_masks, config))
        # Weights to start from bring their position tables, interpolated to this image size.
        build = functools.partial(spec.mae, position_params=bool(config.init_from))
        self.model = build(**how_computed(config))
        self.trained = build(**how_trained(config, mesh))
        super().__init__(config, examples, spec, self.model.encoder, mesh)
        if self.own_masks is not None:
            self.digests["mask.file"] = hashlib.sha256(self.own_masks).hexdigest()
        self.loss_on_all, self.invalid = config.mask.loss == "all", config.mask.invalid
        del self.batch_schema["label"]
        one = jax.eval_shape(lambda: self.masks(jax.random.split(jax.random.key(0), 1)))
        forward = flops.mae_forward_macs(self.model, one.ids_keep.shape[1])
        fixed = self.model.target.macs(spec.image_size)  # nothing runs back through it
        self.train_flops_per_image = flops.train_flops(forward + fixed, forward)
        self.tokenizer = config.tokenizer

    def prepare(self, state: TrainState, data: Splits) -> TrainState:
        """Gives the target its state: the tokenizer's weights, or what fits training crops."""
        if not (self.tokenizer or self.model.target.fitted):
            return state

        def make() -> Any:
            if self.tokenizer:
                return read_tokenizer(self.tokenizer, self.spec.channels)[1]
            with data.crops() as batches:
                images = (normalize(batch["image"], self.mean, self.std) for batch in batches)
                return self.model.target.fit(map(np.asarray, images))

        # All compute it alike, but for the last bits where their CPUs are not of one kind.
        made = multihost_utils.broadcast_one_to_all(in_every_process(make))
        made = place(made, shardings_of(state.frozen["target_state"]))
        return state.replace(frozen={**state.frozen, "target_state": made})

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""
        images = jnp.zeros((1, *self.image_shape))
        masking = self.masks(jax.random.split(jax.random.key(0), 1))
        variables = self.model.init(self.key(INIT), images, masking)
        params, frozen = split(variables["params"], _is_trained)
        return create_state(params, self.optimizer, keep_ema=self.ema_decay > 0, frozen=frozen)

    def masks(self, keys: jax.Array) -> Masking:
        """One mask per key [B]."""
        if self.own_masks is not None:
            return choose_masking(keys, self.own_masks)
        return self.spec.masking(keys)

    def counted(self, images: jax.Array, masking: Masking) -> jax.Array | None:
        """[B, L], 1 for the patches of images [B, H, W, C] uint8 that the loss is over; None where
        they are the removed ones."""
        if not self.loss_on_all and self.invalid < 0:
            return None
        counted = jnp.ones_like(masking.mask) if self.loss_on_all else masking.mask
        if self.invalid >= 0:
            pixels = patchify(images, self.encoder.patch_size)
            counted *= (pixels != self.invalid).any(axis=-1)
        return counted

    def _training_view(self, examples: dict) -> tuple[jax.Array, Masking, jax.Array | None]:
        """Images [B, H, W, C] uint8 as they are trained on, their masks, and `counted`."""
        x = examples["image"]
        if self.flip:
            x = random_flip(x, examples["flip_key"])
        masking = self.masks(examples["mask_key"])
        return x, masking, self.counted(x, masking)

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        """One update; flips and masks depend on (seed, step, position in the global batch) only."""
        images = batch["image"]
        keys = self.keys(TRAIN, state.step, images)
        flip_keys, mask_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)  # [B] each
        examples = {"image": images, "flip_key": flip_keys, "mask_key": mask_keys}

        if self.invalid >= 0:  # the mean is over the images of the whole batch that have data
            some = self._training_view(examples)[2].any(axis=1)  # [B]
            examples["weight"] = some * (len(images) / jnp.maximum(some.sum(), 1))

        def loss_fn(weights: Any, extra: dict, examples: dict) -> tuple[jax.Array, Metrics]:
            x, masking, counted = self._training_view(examples)
            x = normalize(x, self.mean, self.std)  # [B, H, W, C]
            loss = self.trained.apply({"params": weights}, x, masking, counted).loss  # [B]
            return (loss * examples["weight"] if "weight" in examples else loss).mean(), {}

        return self.update(state, loss_fn, examples, self.accumulate)

    def eval_step(self, state: TrainState, batch: dict, index: jax.Array) -> Metrics:
        """Summed loss and count; masks of a batch number are the same in every evaluation."""
        x = normalize(batch["image"], self.mean, self.std)
        params = gather_params(state.weights, self.mesh, self.encoder.dtype)
        masking = self.masks(self.keys(EVAL, index, x))
        counted = self.counted(batch["image"], masking)
        output = self.model.apply({"params": params}, x, masking, counted)
        weight = batch["weight"] if counted is None else batch["weight"] * counted.any(axis=1)
        return {"loss": (output.loss * weight).sum(), "weight": weight.sum()}

    def reconstruct(self, state: TrainState, images: jax.Array) -> dict[str, jax.Array]:
        """Images [B, H, W, C] uint8 with removed patches as predicted: see `reconstruct`."""
        masking = self.masks(jax.random.split(self.key(EVAL), images.shape[0]))
        params = gather_params(state.weights, self.mesh, self.encoder.dtype)
        counted = self.counted(images, masking)
        return reconstruct(self.model, params, images, masking, self.mean, self.std, counted)

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """Tokens [B, 1 + L, D] of whole images [B, H, W, C] uint8; nothing is masked."""
        x = normalize(images, self.mean, self.std)
        params = gather_params(params, self.mesh, self.encoder.dtype)
        return self.model.apply({"params": params}, x, method="encode")

    def actions(
        self, config: ConfigDict, data: Splits, writer: MetricsWriter, workdir: epath.Path
    ) -> list[Action]:
        """Pictures of reconstructions, and the probe where one is asked for."""
        folder = workdir / "reconstructions"
        pictures = draw_reconstructions(self, data, config.pictures.count, folder)
        actions = [Action("pictures", config.pictures.every, pictures, pictures.compile)]
        if config.probe.every:
            probe = Probe(self, data, writer, **probe_options(config))
            actions.append(Action("probe", config.probe.every, probe, probe.compile))
        return actions


def probe_options(config: ConfigDict) -> dict[str, Any]:
    """The fields of `config.probe` for `Probe`; empty names of data are those of `config.data`."""
    options = {name: value or config.data.get(name, value) for name, value in config.probe.items()}
    del options["every"]
    return options


def _ratio_of(masks: np.ndarray, config: ConfigDict) -> float:
    """The share that masks [n, L] hide; UserError where `mask.ratio` says something else. Its
    default does not: it is what users have not given."""
    ratio, said, default = float(masks[0].mean()), config.mask.ratio, FIELDS["mask.ratio"].default
    if said not in (default, ratio) and abs(said - ratio) * masks.shape[1] >= 1:
        raise UserError(f"mask.ratio = {said}: the masks in {config.mask.file} hide {ratio:.4g}")
    logging.info("masks: %d of %s, %.4g hidden", len(masks), config.mask.file, ratio)
    return ratio


def _is_trained(path: str) -> bool:
    """Whether a parameter is trained: all but position tables and the state of a target."""
    return not path.endswith("pos_embed") and not path.startswith("target_state/")
