"""Runs one training on GKE as a JobSet: a Job a slice, a pod a host, restarted as exit codes say.

    python launch/gke.py --name=mae --topology=v5e-256 --slices=2 --spot --image=IMAGE -- \\
        python -m mae_jax.main --config=configs/pretrain.py:vit_l --workdir=gs://BUCKET/mae

renders the manifest and gives it to `kubectl apply`; with `--dry_run` it only prints it.
docs/pods.md goes from an empty project to a running job and back.
"""

import argparse
import re
import subprocess
import sys
from typing import Any

import yaml

from mae_jax import UserError
from mae_jax.planning.chips import CHIPS_A_HOST, Pod, parse_pod

# What GKE calls the chips (cloud.google.com/kubernetes-engine/docs/concepts/tpus).
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
# Saved and left, a hang or a lost peer, killed, stopped unheard; 135, 139: crashed outside Python,
# as of a broken machine. XPK restarts these too (42 and 127 to 255). Other codes are final.
RESTART = [42, 134, 135, 137, 139, 143]
SPOT_GRACE = 25  # Google's advice: a spot machine is gone 30 s after the notice


def manifest(
    name: str,
    pod: Pod,
    image: str,
    command: list[str],
    spot: bool = False,
    queue: str = "",
    grace: int = 0,
    restarts: int = 100,
) -> dict[str, Any]:
    """The JobSet that runs `command` on every host of `pod`."""
    hosts = pod.hosts // pod.slices
    container = {
        "name": "train",
        "image": image,
        "command": command,  # no shell between: the program itself hears SIGTERM
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "securityContext": {"privileged": True},
        "resources": {"limits": {"google.com/tpu": min(pod.chips_a_slice, CHIPS_A_HOST)}},
        # Batches of `data.workers` travel through shared memory: a container has 64 MB of its own.
        "volumeMounts": [{"name": "memory", "mountPath": "/dev/shm"}],
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[pod.chip.name],
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, pod.grid)),
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists"}]
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists"})
    host = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": grace or (SPOT_GRACE if spot else 120),
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
    }
    taken = {"type": "DisruptionTarget", "status": "True"}
    final = {"containerName": "train", "operator": "NotIn", "values": RESTART}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        # The first rule that fits: whatever the code of a pod whose machine was taken, it is
        # counted, which ends the Job and restarts the JobSet.
        "podFailurePolicy": {
            "rules": [
                {"action": "Count", "onPodConditions": [taken]},
                {"action": "FailJob", "onExitCodes": final},
            ]
        },
        "template": {"spec": host},
    }
    metadata: dict[str, Any] = {
        "name": name,
        "annotations": {  # a slice is a node pool
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    if queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": queue}
    final_codes = {"name": "final_exit_code", "action": "FailJobSet"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": restarts,
                "restartStrategy": "BlockingRecreate",  # old pods never meet new ones
                "rules": [final_codes | {"onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": pod.slices, "template": {"spec": job}},
            ],
        },
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--name", required=True, help="of the JobSet: a-z, 0-9 and -")
    parser.add_argument("--topology", required=True, help="a slice, as `plan` takes it: v5e-256")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--image", required=True, help="container image, see launch/Dockerfile")
    parser.add_argument("--spot", action="store_true", help="on spot machines")
    parser.add_argument("--queue", default="", help="Kueue's LocalQueue")
    parser.add_argument("--grace", type=int, default=0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--restarts", type=int, default=100, help="at most, preemptions included")
    parser.add_argument("--dry_run", action="store_true", help="print the manifest, apply nothing")
    parser.add_argument("command", nargs="+", help="after --, what every host runs")
    given = parser.parse_args()
    if not re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", given.name):
        parser.error("--name: at most 40 of a-z, 0-9 and -, a letter first, no - last")
    if given.slices < 1 or given.grace < 0 or given.restarts < 0:
        parser.error("--slices: at least 1; --grace, --restarts: at least 0")
    try:
        pod = parse_pod(given.topology, given.slices)
    except UserError as error:
        parser.error(str(error))
    if pod.chip.name not in ACCELERATORS:
        parser.error(f"--topology={given.topology}: GKE has {', '.join(ACCELERATORS)}")
    options = vars(given) | {"pod": pod}
    for name in ("topology", "slices", "dry_run"):
        del options[name]
    text = yaml.safe_dump(manifest(**options), sort_keys=False, width=1000)
    if given.dry_run:
        print(f"# for: kubectl apply -f -\n{text}", end="")
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main())
