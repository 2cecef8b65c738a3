"""Runs one training on TPU VMs: asks for the pod, starts the command on every host, asks again when
the pod is taken away, and deletes it when the run is over.

    python launch/tpu_vm.py run --name=mae --zone=us-west4-a --topology=v5e-256 --spot -- \\
        python -m mae_jax.main --config=configs/pretrain.py:vit_l --workdir=gs://BUCKET/mae
    python launch/tpu_vm.py logs --name=mae --zone=us-west4-a
    python launch/tpu_vm.py delete --name=mae --zone=us-west4-a

The last commit is what runs. Ctrl-C stops the watching and leaves the pod as it is: the same
command watches on. With `--dry_run` the command lines are only printed. See docs/pods.md.
"""

import argparse
import pathlib
import re
import shlex
import subprocess
import sys
import time

from mae_jax import UserError
from mae_jax.planning.chips import parse_pod

# What a TPU VM boots (cloud.google.com/tpu/docs/runtimes). TPU7x is not served this way.
RUNTIMES = dict.fromkeys(("v2", "v3", "v4"), "tpu-ubuntu2204-base") | {
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# Saved and left, a hang or a lost peer, killed, stopped unheard; 135, 139: crashed outside Python,
# as of a broken machine. Other codes are final.
RESTART = (42, 134, 135, 137, 139, 143)
TAKEN = ("SUSPENDED", "FAILED", "PREEMPTED")
NO_CAPACITY = re.compile("RESOURCE_EXHAUSTED|no more capacity|UNAVAILABLE", re.IGNORECASE)
TRIES = 3  # of what should work on machines that are there

ROOT = pathlib.Path(__file__).parents[1]
ARCHIVE = "mae_jax.tar.gz"
GCLOUD = ["gcloud", "compute", "tpus", "queued-resources"]
UNPACK = f"rm -rf mae_jax && mkdir mae_jax && tar -xzf {ARCHIVE} -C mae_jax"
HOST = "bash mae_jax/launch/host.sh"


def command_lines(given: argparse.Namespace) -> dict[str, list[str]]:
    """Everything that is done, by name."""
    name, zone, flags = given.name, f"--zone={given.zone}", shlex.split(given.ssh_flags)
    everywhere = ["--node=all", "--worker=all", *flags]

    def ssh(command: str, where: list[str]) -> list[str]:
        return [*GCLOUD, "ssh", name, zone, *where, f"--command={command}"]

    first = ["--node=0", "--worker=0", *flags]
    lines = {
        "describe": [*GCLOUD, "describe", name, zone, "--format=value(state.state)"],
        "delete": [*GCLOUD, "delete", name, zone, "--force", "--quiet"],
        "logs": ssh("tail -n 100 -F mae_jax/log", first),
    }
    if given.action == "run":
        pod = given.pod
        size = pod.chips_a_slice * pod.chip.cores
        kind = "v5litepod" if pod.chip.name == "v5e" else pod.chip.name
        create = [f"--accelerator-type={kind}-{size}"]
        create += [f"--runtime-version={RUNTIMES[pod.chip.name]}"]
        if pod.slices == 1:
            create += [f"--node-id={name}"]
        else:
            create += [f"--node-count={pod.slices}", f"--node-prefix={name}"]
        create += ["--spot"] * given.spot + ["--reserved"] * given.reserved
        lines |= {
            "create": [*GCLOUD, "create", name, zone, *create, *shlex.split(given.create_flags)],
            "pack": ["git", "archive", "--format=tar.gz", f"--output={ARCHIVE}", "HEAD"],
            "copy": [*GCLOUD, "scp", ARCHIVE, f"{name}:{ARCHIVE}", zone, *everywhere],
            "install": ssh(f"{UNPACK} && {HOST} install", everywhere),
            "start": ssh(f"{HOST} start {shlex.join(given.command)}", everywhere),
            "poll": ssh(f"{HOST} poll || echo state=new", first),
            "collect": ssh(f"{HOST} logs", everywhere),
        }
    return lines


class Supervisor:
    """Keeps the command running on a pod until it ends by itself."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.lines = command_lines(given)

    def do(self, name: str) -> subprocess.CompletedProcess[str]:
        """Runs a command line, quietly unless it fails."""
        done = subprocess.run(
            self.lines[name], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode and "NOT_FOUND" not in done.stderr:
            say(f"{name}: exit status {done.returncode}\n{done.stderr.strip()}")
        return done

    def state(self) -> str:
        """Of the queued resource: ABSENT where there is none, UNKNOWN where nobody can tell."""
        done = self.do("describe")
        if done.returncode:
            return "ABSENT" if "NOT_FOUND" in done.stderr else "UNKNOWN"
        return done.stdout.strip()

    def poll(self) -> str:
        """Of the command on the first host (all of a run end alike): its exit status or a word."""
        found = re.search(r"state=(\w+)", self.do("poll").stdout)
        return found[1] if found else "unreachable"

    def run(self) -> int:
        """Returns the command's exit status once it is final and the pod is deleted."""
        before = ""
        started = False  # on these machines
        restarts = failures = 0
        while True:
            state = self.state()
            if state != before:
                say(state)
            if state == "UNKNOWN" and not before:
                return 2  # no project, no permission, no such zone
            before = state
            if state == "ABSENT":
                started, failures = False, 0
                done = self.do("create")
                if done.returncode and not NO_CAPACITY.search(done.stderr):
                    return 2
            elif state in TAKEN:
                self.do("delete")
            elif state == "ACTIVE":
                status = self.poll()
                if status == "running":
                    started, failures = True, 0
                elif started and status.isdigit() and int(status) not in RESTART:
                    say(f"the command ended with exit status {status}")
                    return self.finish(int(status))
                elif status == "unreachable":
                    failures += 1
                else:
                    if started and restarts == self.given.restarts:
                        say(f"exit status {status} after {restarts} restarts: not again")
                        return self.finish(1)
                    if started:
                        restarts += 1
                        say(f"exit status {status}: restart {restarts}")
                    steps = ("start",) if started else ("pack", "copy", "install", "start")
                    works = all(self.do(step).returncode == 0 for step in steps)
                    started, failures = started or works, failures + (not works)
                if failures == TRIES:
                    say(f"{TRIES} failures in a row on machines that are there")
                    if not started:
                        return self.finish(1)
                    self.do("delete")
                    failures = 0
            time.sleep(self.given.poll)

    def finish(self, status: int) -> int:
        """Fetches the ends of the logs, deletes the pod and makes sure that it is gone."""
        logs = self.do("collect").stdout
        with open(f"{self.given.name}.log", "a") as file:
            file.write(logs)
        say(f"the ends of all hosts' logs are in {file.name}; the last lines:")
        print("\n".join(logs.splitlines()[-20:]))
        return status if self.given.keep or self.remove() else 1

    def remove(self) -> bool:
        """Whether nothing is left to pay for."""
        for _ in range(TRIES):
            self.do("delete")
            if self.state() == "ABSENT":
                say("deleted")
                return True
            time.sleep(self.given.poll)
        say(f"STILL THERE AND BILLED: {shlex.join(self.lines['delete'])}")
        return False


def say(text: str) -> None:
    """A line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


PLAN = (
    ("create", "where there is no pod of this name"),
    ("describe", "every {poll} s; a pod that was taken away is deleted and asked for again"),
    ("pack", "once it is ACTIVE: send and install the last commit"),
    ("copy", ""),
    ("install", ""),
    ("start", "start; again after exit status {codes}, at most {restarts} times"),
    ("poll", "every {poll} s"),
    ("collect", "after any other exit status"),
    ("delete", "and unless --keep"),
)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("action", choices=("run", "logs", "delete"))
    parser.add_argument("--name", required=True, help="of the pod: a-z, 0-9 and -")
    parser.add_argument("--zone", required=True, help="such as us-west4-a")
    parser.add_argument("--topology", default="", help="a slice, as `plan` takes it: v5e-256")
    parser.add_argument("--slices", type=int, default=1)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--spot", action="store_true", help="on spot machines")
    kinds.add_argument("--reserved", action="store_true", help="on reserved machines")
    parser.add_argument("--keep", action="store_true", help="do not delete the pod at the end")
    parser.add_argument("--restarts", type=int, default=100, help="at most, on the same machines")
    parser.add_argument("--poll", type=int, default=60, help="seconds between looks")
    parser.add_argument("--create_flags", default="", help="more of gcloud's, one string")
    parser.add_argument("--ssh_flags", default="", help="such as --tunnel-through-iap")
    parser.add_argument("--dry_run", action="store_true", help="print the command lines only")
    parser.usage = "%(prog)s {run,logs,delete} --name=NAME --zone=ZONE [options] -- COMMAND"
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = parser.parse_args(sys.argv[1:end])
    given.command = sys.argv[end + 1 :]
    if not re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", given.name):
        parser.error("--name: at most 40 of a-z, 0-9 and -, a letter first, no - last")
    if given.slices < 1 or given.restarts < 0 or given.poll < 0:
        parser.error("--slices: at least 1; --restarts, --poll: at least 0")
    if given.action == "run":
        if not given.topology or not given.command:
            parser.error("run: give --topology, and after -- the command of every host")
        try:
            given.pod = parse_pod(given.topology, given.slices)
        except UserError as error:
            parser.error(str(error))
        if given.pod.chip.name not in RUNTIMES:
            parser.error(f"--topology={given.topology}: TPU VMs have {', '.join(RUNTIMES)}")
    supervisor = Supervisor(given)
    if given.dry_run:
        plan = PLAN if given.action == "run" else ((given.action, ""),)
        codes = ", ".join(map(str, RESTART))
        for name, when in plan:
            if when:
                print("#", when.format(codes=codes, **vars(given)))
            print(shlex.join(supervisor.lines[name]))
        return 0
    try:
        if given.action == "logs":
            return subprocess.run(supervisor.lines["logs"]).returncode
        return supervisor.run() if given.action == "run" else int(not supervisor.remove())
    except KeyboardInterrupt:
        say("the pod goes on, and so does its bill: the same command watches on, `delete` ends it")
        return 130


if __name__ == "__main__":
    sys.exit(main())
