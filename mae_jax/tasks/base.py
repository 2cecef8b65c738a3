"""What all tasks share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax import config as config_lib
from mae_jax.augment.pixels import example_keys
from mae_jax.data.record import ArraySpec
from mae_jax.data.splits import Splits
from mae_jax.distributed.mesh import batch_sharding
from mae_jax.distributed.overlap import compiler_options
from mae_jax.evaluators.means import Evaluation
from mae_jax.interop.export import export_encoder
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import ViT, sincos_position_table
from mae_jax.train import optimizers
from mae_jax.train.gradients import LossFn, gradients
from mae_jax.train.loop import Action
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import Metrics, TrainState, apply_gradients

WITHOUT_KERNELS = ("TPU v2", "TPU v3")  # libtpu compiles the products of ours for none of these
# Purposes of random keys, so that they never collide.
TRAIN, EVAL, INIT, MIX = 0, 1, 2, 3


def how_computed(config: ConfigDict) -> dict[str, Any]:
    """How the models of a `ModelSpec` are computed: what its builders take beside it."""
    return {
        "dtype": jnp.dtype(config.compute_dtype),
        "residual_dtype": jnp.dtype(config.model.residual_dtype),
        "stacking": config.model.stacking,
        "remat": config.model.remat,
    }


def how_trained(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """The same inside the training step, where each device runs its own examples; UserError where
    `mesh` has none of the TPUs that the config's kernel is for."""
    device = mesh.devices.flat[0]
    missing = device.platform != "tpu" or device.device_kind in WITHOUT_KERNELS
    if config.model.attention == "kernel" and missing:
        raise UserError(
            "model.attention=kernel is for TPUs from v4 on; these devices are "
            f"{device.device_kind}: leave it plain"
        )
    return how_computed(config) | {"attention": config.model.attention, "local": True}


class BaseTask:
    """Most of a `train.task.Task` on a ViT; a task adds `init`, two steps, `train_flops_per_image`.

    `examples` are an epoch's; `spec`, `encoder` of the model trained or probed, as it is exported.
    """

    metric_names = ("loss", "grad_norm", "lr")
    decays = staticmethod(optimizers.decays)  # which parameters have weight decay

    def __init__(
        self, config: ConfigDict, examples: int, spec: ModelSpec, encoder: ViT | None, mesh: Mesh
    ):
        self.total_steps = config_lib.total_steps(config, examples)
        self.batch_size = config.batch_size
        self.eval_batch_size = config.eval.batch_size or config.batch_size
        self.mesh, self.spec, self.encoder = mesh, spec, encoder
        self.compiler_options = compiler_options(mesh) if config.mesh.overlap else {}
        self.mean, self.std = spec.mean, spec.std
        self.image_shape = (*spec.image_size, spec.channels)
        self.batch_schema = {
            "image": ArraySpec(self.image_shape, np.uint8),
            "label": ArraySpec((), np.int32),
        }
        self.flip = config.data.flip
        self.accumulate = config.optim.accumulate
        self.ema_decay = config.optim.ema
        self.schedule = optimizers.warmup_then(
            config.optim.schedule,
            base_lr=config.optim.base_lr,
            batch_size=config.batch_size,
            warmup_steps=config_lib.warmup_steps(config, examples),
            total_steps=self.total_steps,
            min_lr=config.optim.min_lr,
        )
        name = config_lib.optimizer(config)
        self.optimizer = optimizers.create(name, self.schedule, config.optim, mask=self.decays)
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        self.reduce_dtype = jnp.dtype(config.optim.reduce_dtype)
        self.digests: dict[str, str] = {}
        self._seed = config.seed

    def update(
        self, state: TrainState, loss_fn: LossFn, examples: dict, parts: int
    ) -> tuple[TrainState, Metrics]:
        """One step down the gradients of `loss_fn`; see `gradients`."""
        types = {"compute_dtype": self.compute_dtype, "reduce_dtype": self.reduce_dtype}
        grads, metrics = gradients(loss_fn, state, examples, mesh=self.mesh, parts=parts, **types)
        with jax.named_scope("optimizer"):
            metrics |= {"grad_norm": optax.tree.norm(grads), "lr": self.schedule(state.step)}
            return apply_gradients(state, grads, self.optimizer, self.ema_decay), metrics

    @property
    def fixed_positions(self) -> dict[str, np.ndarray]:
        """Position tables by their name in the state: those that runs of version 0.1 had unsaid."""
        widths = {"encoder": self.spec.width, "decoder": self.spec.decoder_width}
        return {
            f"frozen/{part}/pos_embed": sincos_position_table(width, self.spec.grid)[None]
            for part, width in widths.items()
            if width
        }

    def prepare(self, state: TrainState, data: Splits) -> TrainState:
        """The state as it is."""
        return state

    def scalars(self, means: dict[str, Any]) -> dict[str, float]:
        """The means as they are."""
        return means

    def evaluation(
        self, inputs: Any, writer: MetricsWriter, shardings: Any, max_batches: int
    ) -> Evaluation:
        """Means of `eval_step` over the evaluation split."""
        return Evaluation(self, inputs, writer, shardings, max_batches)

    def inputs(self, data: Splits, state: TrainState, workdir: epath.Path) -> Any:
        """The data as they are."""
        return data

    def draw_inputs(self, data: Splits, workdir: epath.Path) -> None:
        """Nothing to see."""

    def actions(
        self, config: ConfigDict, data: Splits, writer: MetricsWriter, workdir: epath.Path
    ) -> list[Action]:
        """Nothing beside evaluating and saving."""
        return []

    def export(self, state: TrainState, directory: epath.Path, facts: dict[str, Any]) -> None:
        """Writes encoder and head of a host-side `state` for others to load, with a card."""
        export_encoder(state.weights, directory, self.spec, facts)

    def key(self, purpose: int) -> jax.Array:
        """The run's random key for one purpose."""
        return jax.random.fold_in(jax.random.key(self._seed), purpose)

    def keys(self, purpose: int, step: jax.Array, examples: jax.Array) -> jax.Array:
        """A key for each of a global batch [B, ...], laid out as the batch: [B]."""
        positions = jnp.arange(examples.shape[0], dtype=jnp.int32)
        positions = jax.lax.with_sharding_constraint(positions, batch_sharding(self.mesh))
        return example_keys(self.key(purpose), step, positions)
