"""Plans of steps that nobody compiled, in round numbers."""

import dataclasses

from mae_jax.planning.chips import GIB, parse_pod
from mae_jax.planning.cost import Communication, PartCost
from mae_jax.planning.figures import Layout, Plan, advice
from mae_jax.planning.program import Program


def plan(pod="v5e-256", layout=None, compute=0.2, exchange=0.05, peak=10.0, **changes):
    """Of a batch of 4096, 100 TFLOP an update, its exchange beside nothing else."""
    pod = parse_pod(pod)
    layout = layout or Layout(4096, 1, "none", pod.devices, 1)
    parts = {"encoder MLP": 0.75, "optimizer": 0.25}
    made = Plan(
        pod=pod,
        layout=layout,
        steps=36_000,
        flops=1e14,
        state_bytes=4 * GIB,
        peak_bytes=round(peak * GIB),
        parts={name: PartCost(share * compute) for name, share in parts.items()},
        exchanged=(Communication("all-reduce", "ici", 1_000_000, 10, exchange),),
        waiting_seconds=exchange,
        program=Program(()),
        decode_ms=4.0,
    )
    made = dataclasses.replace(made, **changes)
    return made if made.fits else dataclasses.replace(made, parts={}, advice=advice(made))
