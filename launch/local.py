"""Runs one training as several processes on this machine, each with simulated CPU devices.

    python launch/local.py --processes=2 --devices=4 -- \\
        python -m mae_jax.main --config=configs/quickstart.py --workdir=DIR

The processes find each other as they would on a pod: this is how multi-host runs are tested without
one. Lines of a process are prefixed with its number. SIGTERM and Ctrl-C are passed on, so that the
run saves and leaves. Where one process fails the others leave by themselves; those that have not
after `--grace` seconds are killed. This program's exit status is that of the first to fail.

`--restarts=N` starts all of them again, at most N times, as a supervisor does: when the run was
preempted (42), lost a process or hung (134), or a process was killed. `--dry_run` prints what would
be run.
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

WORTH_A_RESTART = (42, 134, 137, 143)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def variables(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What tells process number `process` who it is (see `mae_jax.distributed.startup`)."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }


def relay(process: subprocess.Popen, number: int) -> None:
    """Copies a process's output to ours, line by line."""
    for line in process.stdout:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


def say(text: str) -> None:
    """Prints a line of our own."""
    sys.stdout.write(f"launch: {text}\n")
    sys.stdout.flush()


class Launcher:
    """The processes of one run, started as often as it takes."""

    def __init__(self, command: list[str], processes: int, devices: int, grace: float):
        self.command, self.processes, self.devices = command, processes, devices
        self.grace = grace
        self.running: list[subprocess.Popen] = []
        self.told_to_stop: int | None = None
        signal.signal(signal.SIGTERM, self.pass_on)
        signal.signal(signal.SIGINT, self.pass_on)

    def pass_on(self, number: int, _: object) -> None:
        """Tells the processes to stop; a second time, that they do so at once."""
        again, self.told_to_stop = self.told_to_stop is not None, number
        for process in self.running:
            process.send_signal(number if again else signal.SIGTERM)

    def once(self) -> int:
        """Runs all processes and returns the exit status of the first to fail, or 0."""
        port = free_port()
        self.running = [
            subprocess.Popen(
                self.command,
                env=os.environ | variables(i, self.processes, self.devices, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C comes from here, once
            )
            for i in range(self.processes)
        ]
        say("started as " + ", ".join(f"[{i}] {p.pid}" for i, p in enumerate(self.running)))
        relays = [threading.Thread(target=relay, args=(p, i)) for i, p in enumerate(self.running)]
        for thread in relays:
            thread.start()
        first, since, ended = 0, 0.0, set()
        while len(ended) < self.processes:
            time.sleep(0.1)  # short, so that signals are handled
            for number, process in enumerate(self.running):
                if number in ended or process.poll() is None:
                    continue
                ended.add(number)
                status = process.returncode
                status = 128 - status if status < 0 else status  # as a shell says it
                if status and not first:
                    first, since = status, time.monotonic()
                after = f", {time.monotonic() - since:.0f} s after the first" if first else ""
                say(f"[{number}] ended with {status}{after}")
            if first and time.monotonic() - since > self.grace:
                for number, process in enumerate(self.running):
                    if number not in ended:
                        say(f"[{number}] is killed: it did not leave in {self.grace:.0f} s")
                        process.kill()
        for thread in relays:
            thread.join()
        return first

    def run(self, restarts: int) -> int:
        """Runs until the end, or until another start would not help."""
        for restart in range(restarts + 1):
            status = self.once()
            if self.told_to_stop == signal.SIGINT:
                return 130
            if status not in WORTH_A_RESTART or self.told_to_stop or restart == restarts:
                return status
            say(f"restart {restart + 1} of at most {restarts}, after status {status}")
        return status


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="simulated devices a process")
    parser.add_argument("--restarts", type=int, default=0, help="at most so many")
    parser.add_argument("--grace", type=float, default=75.0, help="seconds after the first failure")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    parser.add_argument("command", nargs="+", help="after --, the command every process runs")
    arguments = parser.parse_args()
    if min(arguments.processes, arguments.devices) < 1:
        parser.error("--processes and --devices: at least 1")
    if min(arguments.restarts, arguments.grace) < 0:
        parser.error("--restarts and --grace: not negative")
    if shutil.which(arguments.command[0]) is None:
        parser.error(f"{arguments.command[0]}: no such command")
    if arguments.dry_run:
        for i in range(arguments.processes):
            named = variables(i, arguments.processes, arguments.devices, 0).items()
            names = [f"{name}={value}" for name, value in named]
            print(shlex.join(["env", *names, *arguments.command]))
        print("# port 0 stands for a free one, chosen at the start")
        return 0
    processes, devices = arguments.processes, arguments.devices
    return Launcher(arguments.command, processes, devices, arguments.grace).run(arguments.restarts)


if __name__ == "__main__":
    sys.exit(main())
