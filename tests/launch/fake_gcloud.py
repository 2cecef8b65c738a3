"""A `gcloud compute tpus queued-resources` whose pod is two folders of this machine: what it is
told to run there runs, with the folder as home. $FAKE holds its state and `plan.txt`, what becomes
of each pod that is asked for: refused (no capacity), denied, failed (while it waits), taken (once
its command wrote `ready`), unreachable (likewise) or kept. Each call is a line of `calls.txt`."""

import os
import pathlib
import shutil
import subprocess
import sys

FAKE = pathlib.Path(os.environ["FAKE"])
HOSTS = [FAKE / "host0", FAKE / "host1"]


def fail(message: str) -> None:
    sys.exit(f"ERROR: (gcloud.compute.tpus.queued-resources) {message}")


def kill(host: pathlib.Path) -> None:
    """As a machine that is gone."""
    for group in pathlib.Path("/dev/shm").glob("mae_jax" + str(host).replace("/", "_") + "*"):
        subprocess.run(["kill", "-KILL", "--", f"-{group.read_text().strip()}"], check=False)
        group.unlink()


def main() -> None:
    service, verb, name, *rest = sys.argv[3:]
    assert service == "queued-resources"
    with open(FAKE / "calls.txt", "a") as file:
        print(verb, name, *rest, file=file)
    options = dict(word.removeprefix("--").partition("=")[::2] for word in rest)
    pod, plan = FAKE / "pod.txt", (FAKE / "plan.txt").read_text().split()
    asked = FAKE / "asked.txt"
    count = int(asked.read_text()) if asked.exists() else 0
    fate = pod.read_text() if pod.exists() else "absent"
    if verb == "create":
        assert fate == "absent", "it exists"
        asked.write_text(str(count + 1))
        if plan[count] == "refused":
            fail("RESOURCE_EXHAUSTED: There is no more capacity in the zone")
        if plan[count] == "denied":
            fail("PERMISSION_DENIED: Cloud TPU API has not been used in project")
        pod.write_text(plan[count])
        for host in HOSTS:
            host.mkdir()
    elif fate == "absent":
        fail("NOT_FOUND: Resource was not found")
    elif verb == "describe":
        ready = all((host / "ready").exists() for host in HOSTS)
        if fate == "taken" and ready:
            for host in HOSTS:
                kill(host)
        states = {"failed": "FAILED", "taken": "SUSPENDED" if ready else "ACTIVE"}
        print(states.get(fate, "ACTIVE"))
    elif verb == "delete":
        for host in HOSTS:
            kill(host)
            shutil.rmtree(host)
        pod.unlink()
    elif verb == "scp":
        for host in HOSTS:
            shutil.copy(name, host / rest[0].partition(":")[2])
    elif verb == "ssh":
        print("Using ssh batch size of 64.", file=sys.stderr)
        if fate == "unreachable" and (HOSTS[0] / "ready").exists():
            fail("the node is not READY")
        status = 0
        for number, host in enumerate(HOSTS):
            if options["worker"] in ("all", str(number)):
                environment = os.environ | {"HOME": str(host), "HOST": str(number)}
                shell = ["bash", "-c", options["command"]]
                done = subprocess.run(shell, cwd=host, env=environment, check=False)
                status = status or done.returncode
        sys.exit(status)


main()
