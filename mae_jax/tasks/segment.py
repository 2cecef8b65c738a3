"""Semantic segmentation: an encoder and UperNet, fine-tuned on label maps (paper table 5)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.record import ArraySpec
from mae_jax.data.splits import Splits
from mae_jax.distributed.mesh import BATCH_AXES, batch_sharding
from mae_jax.distributed.sharding import gather_params
from mae_jax.evaluators.segmentation import SegmentationEvaluation
from mae_jax.interop.export import export_segmenter
from mae_jax.models import flops
from mae_jax.models.patches import normalize_shown
from mae_jax.models.segmenter import segmentation_loss, segmenter_variables
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import drop_path_scale
from mae_jax.pictures.segmentation import draw_crops, draw_segmentations
from mae_jax.tasks.base import INIT, TRAIN, BaseTask, how_computed
from mae_jax.train import optimizers
from mae_jax.train.loop import Action
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import Metrics, TrainState, create_state

BATCH_NORM_MOMENTUM = 0.1  # as PyTorch counts it: the share of the new statistics


class Segment(BaseTask):
    """A class for every pixel, as pure functions of (state, batch).

    Batch norm takes its statistics over the global batch (over each of its parts where
    `optim.accumulate` makes several); the running ones lie in `state.frozen["statistics"]`.
    """

    decays = staticmethod(optimizers.decays_in_fine_tuning)

    def __init__(self, config: ConfigDict, examples: int, spec: ModelSpec, mesh: Mesh):
        how = how_computed(config)
        self.model = spec.segmenter(**how)  # as it is evaluated
        self.trained = spec.segmenter(axis_names=BATCH_AXES, **how)
        super().__init__(config, examples, spec, self.model.encoder, mesh)
        size = spec.image_size
        self.batch_schema = {
            "image": ArraySpec(self.image_shape, np.uint8),
            "segmentation": ArraySpec(size, np.uint8),
            "size": ArraySpec((2,), np.int32),
        }
        self.drop_path = config.model.drop_path
        layer_decay = optimizers.scale_by_layer(spec.depth, config.optim.layer_decay)
        self.optimizer = optax.chain(self.optimizer, layer_decay)
        self.train_flops_per_image = flops.train_flops(flops.segmenter_forward_macs(self.model))

    def init(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""
        variables = self.model.init(self.key(INIT), jnp.zeros((1, *self.image_shape)))
        frozen = {"statistics": variables["statistics"]}
        return create_state(variables["params"], self.optimizer, keep_ema=False, frozen=frozen)

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        """One update; what is random depends on (seed, step, position in the global batch) only."""
        keys = self.keys(TRAIN, state.step, batch["image"])
        path_keys, dropout_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)  # [B] each
        examples = {**batch, "path_key": path_keys, "dropout_key": dropout_keys}
        examples = jax.lax.with_sharding_constraint(examples, batch_sharding(self.mesh))

        def loss_fn(weights: Any, extra: dict, examples: dict) -> tuple[jax.Array, Metrics]:
            path_scale = None
            if self.drop_path:
                path_scale = drop_path_scale(
                    examples["path_key"], self.encoder.depth, self.drop_path
                )
            x = normalize_shown(examples["image"], examples["size"], self.mean, self.std)
            (logits, auxiliary), seen = self.trained.apply(
                segmenter_variables(weights),
                *(x, path_scale, examples["dropout_key"]),
                mutable=["batch"],
            )
            loss = segmentation_loss(logits, auxiliary, examples["segmentation"])
            return loss, {"statistics": seen["batch"]}

        running = state.frozen["statistics"]
        state, metrics = self.update(state, loss_fn, examples, self.accumulate)
        moved = jax.tree.map(
            lambda old, new: old + BATCH_NORM_MOMENTUM * (new - old),
            *(running, metrics.pop("statistics")),
        )
        return state.replace(frozen={"statistics": moved}), metrics

    def windows_logits(self, state: TrainState, images: jax.Array, size: jax.Array) -> jax.Array:
        """Logits [B, s, s', classes] float32 of windows [B, H, W, C] uint8 that show something in
        their upper left, `size` [B, 2]; a quarter of a patch each."""
        weights = gather_params(state.weights, self.mesh, self.encoder.dtype)
        x = normalize_shown(images, size, self.mean, self.std)
        return self.model.apply(segmenter_variables(weights), x)[0]

    def evaluation(
        self, inputs: Splits, writer: MetricsWriter, shardings: Any, max_batches: int
    ) -> SegmentationEvaluation:
        """Sliding windows over whole pictures; mIoU over the split."""
        return SegmentationEvaluation(self, inputs, writer, shardings, max_batches)

    def draw_inputs(self, data: Splits, workdir: epath.Path) -> None:
        """Training crops and their label maps."""
        draw_crops(self, data, workdir / "augmentations.png")

    def actions(
        self, config: ConfigDict, data: Splits, writer: MetricsWriter, workdir: epath.Path
    ) -> list[Action]:
        """Pictures of predictions."""
        pictures = draw_segmentations(self, data, config.pictures.count, workdir / "predictions")
        return [Action("pictures", config.pictures.every, pictures, pictures.compile)]

    def export(self, state: TrainState, directory: epath.Path, facts: dict[str, Any]) -> None:
        """Writes encoder, pyramid and head of a host-side `state`, with a card."""
        export_segmenter(state.weights, directory, self.spec, facts)
