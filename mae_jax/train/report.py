"""What people and dashboards see of a run: rates and losses."""

import dataclasses

from jax.sharding import Mesh

from mae_jax.data.pipeline import Batches
from mae_jax.train.ledger import Ledger
from mae_jax.train.loop import Interval
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.task import Task
from mae_jax.train.throughput import peak_flops


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Turns finished log intervals into metrics and a line for people."""

    task: Task
    mesh: Mesh
    writer: MetricsWriter
    examples: int
    batches: Batches
    ledger: Ledger

    def __call__(self, interval: Interval) -> str:
        task = self.task
        rate = interval.steps * task.batch_size / interval.seconds
        flops = rate * task.train_flops_per_image / self.mesh.size
        scalars = {f"train/{name}": value for name, value in interval.metrics.items()}
        scalars |= {
            "train/epoch": interval.step * task.batch_size / self.examples,
            "train/images_per_second": rate,
            "train/seconds_per_step": interval.seconds / interval.steps,
            "train/data_wait": interval.data_seconds / interval.seconds,
            "train/skipped_records": self.batches.skipped,  # by this process, since its start
            "train/model_flops_per_second_per_device": flops,
            "goodput": self.ledger.goodput,
        }
        line = (
            f"loss {interval.metrics['loss']:.4f}  lr {interval.metrics['lr']:.2e}  "
            f"{rate:.0f} img/s  data wait {scalars['train/data_wait']:.0%}"
        )
        peak = peak_flops(self.mesh.devices.flat[0])
        if peak is not None:
            scalars["train/mfu"] = flops / peak
            line += f"  MFU {scalars['train/mfu']:.1%}"
        self.writer.write(interval.step, scalars)
        self.ledger.write()
        return line
