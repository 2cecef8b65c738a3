"""The JobSet that launch/gke.py renders: against the CRD, the restart rules, golden text."""

import copy
import json
import pathlib
import subprocess
import sys

import pytest

from tests.program import ROOT, assert_refused_in_one_line

yaml = pytest.importorskip("yaml", reason="manifests need PyYAML")
HERE = pathlib.Path(__file__).parent
COMMAND = [
    *("python", "-m", "mae_jax.main"),
    *("--config=configs/pretrain.py:vit_l", "--workdir=gs://BUCKET/mae"),
]


def gke(*options, path=None):
    return subprocess.run(
        [sys.executable, ROOT / "launch/gke.py", *options, "--", *COMMAND],
        capture_output=True,
        text=True,
        env=path and {"PATH": str(path), "PYTHONPATH": str(ROOT)},
    )


def render(*options):
    done = gke("--name=mae", "--image=IMAGE", "--dry_run", *options)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.fixture(scope="module")
def spot_slices():
    return render("--topology=v5e-256", "--slices=2", "--spot", "--queue=tpus")


def errors(manifest):
    jsonschema = pytest.importorskip("jsonschema", reason="the schema's language")
    schema = json.loads((HERE / "jobset.schema.json").read_text())
    return list(jsonschema.Draft202012Validator(schema).iter_errors(manifest))


def test_fits_the_schema(spot_slices):
    assert errors(spot_slices) == []
    assert errors(render("--topology=v6e-1")) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda spec, job, pod: spec.update(maxRestarts=1),
        lambda spec, job, pod: spec["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda spec, job, pod: job["podFailurePolicy"]["rules"][1].update(action="FailJobSet"),
        lambda spec, job, pod: job.update(parallelism="64"),
        lambda spec, job, pod: job.pop("template"),
        lambda spec, job, pod: pod.update(terminationGrace=25),
        lambda spec, job, pod: pod["containers"][0].update(cmd=["python"]),
    ],
)
def test_the_schema_refuses_what_the_cluster_would(spot_slices, change):
    manifest = copy.deepcopy(spot_slices)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    change(manifest["spec"], job, job["template"]["spec"])
    assert errors(manifest)


def test_pods_are_the_products_hosts(spot_slices):
    # Machine shapes as Google's GKE pages print them: v5e 16x16 is 64 machines of 4 chips.
    slices = spot_slices["spec"]["replicatedJobs"][0]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert slices["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 64
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["terminationGracePeriodSeconds"] == 25
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["containers"][0]["command"] == COMMAND  # python itself is process 1
    assert spot_slices["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}


@pytest.mark.parametrize(
    ("topology", "label", "grid", "hosts", "chips"),
    [
        ("v4-128", "tpu-v4-podslice", "4x4x4", 16, 4),  # 128 cores are 64 chips
        ("v5p-64", "tpu-v5p-slice", "2x4x4", 8, 4),
        ("v6e-64", "tpu-v6e-slice", "8x8", 16, 4),
        ("v6e-1", "tpu-v6e-slice", "1x1", 1, 1),
        ("tpu7x-128", "tpu7x", "4x4x4", 16, 4),
    ],
)
def test_topologies(topology, label, grid, hosts, chips):
    job = render(f"--topology={topology}")["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == grid
    assert job["parallelism"] == hosts
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]


def outcome(manifest, code, disrupted=False):
    """What Kubernetes and JobSet make of a pod that ends with `code`, by their documented rules:
    the first pod rule that matches decides; backoffLimit 0 ends the Job for any other failure; the
    JobSet restarts unless a rule on the Job's reason says otherwise."""
    if code == 0:
        return "done"
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason = "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        listed = codes and (code in codes["values"]) == (codes["operator"] == "In")
        if listed or (disrupted and "onPodConditions" in rule):
            reason = "PodFailurePolicy" if rule["action"] == "FailJob" else reason
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "RestartJobSet"


def test_exit_codes_restart_what_xpk_restarts(spot_slices):
    xpk = {42, *range(127, 256)}  # its default, in src/xpk/commands/workload.py
    for code in (42, 134, 135, 137, 139, 143):
        assert outcome(spot_slices, code) == "RestartJobSet"
        assert code in xpk
    for code in (1, 2):
        assert outcome(spot_slices, code) == "FailJobSet"
        assert code not in xpk
    assert outcome(spot_slices, 0) == "done"


def test_a_taken_machine_restarts_whatever_its_pod_said(spot_slices):
    assert outcome(spot_slices, 1, disrupted=True) == "RestartJobSet"


def test_golden():
    done = gke(
        *("--name=mae", "--topology=v5e-256", "--slices=2", "--spot", "--queue=tpus"),
        *("--image=REGION-docker.pkg.dev/PROJECT/mae/mae_jax", "--dry_run"),
    )
    assert done.stdout == (HERE / "goldens/gke.yaml").read_text()


def test_is_given_to_kubectl(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\n/bin/cat >{tmp_path}/stdin\n')
    kubectl.chmod(0o755)
    options = ("--name=mae", "--topology=v5e-16", "--image=IMAGE")
    assert gke(*options, path=tmp_path).returncode == 0
    assert (tmp_path / "arguments").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "stdin").read_text()) == render("--topology=v5e-16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name=mae", "--topology=v5e-7", "--image=I"), "v5e-7"),
        (("--name=Mae_1", "--topology=v5e-16", "--image=I"), "--name"),
        (("--name=mae", "--topology=v5e-16", "--image=I", "--slices=0"), "--slices"),
        (("--name=mae", "--topology=v3-32", "--image=I"), "v3-32"),
        (("--name=mae", "--topology=v5e-16"), "--image"),
    ],
)
def test_refuses_in_one_line(options, message):
    assert_refused_in_one_line(gke(*options), message)
