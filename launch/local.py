"""Runs one training as several processes on this machine, each with simulated CPU devices.

    python launch/local.py --processes=2 --devices=4 -- \\
        python -m mae_jax.main --config=configs/quickstart.py --workdir=DIR

The processes find each other as they would on a pod: this is how multi-host runs are tested without
one. Lines of a process are prefixed with its number. The first failure ends all of them, and its
exit status is this program's; SIGTERM and Ctrl-C are passed on, so that the run saves and leaves.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What tells process number `process` who it is (see `mae_jax.distributed.startup`)."""
    return os.environ | {
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


def launch(command: list[str], processes: int, devices: int) -> int:
    """Runs `command` in every process and returns the first exit status that is not 0, or 0."""
    port = free_port()
    running = [
        subprocess.Popen(
            command,
            env=environment(i, processes, devices, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    relays = [threading.Thread(target=relay, args=(p, i)) for i, p in enumerate(running)]
    for thread in relays:
        thread.start()

    def pass_on(number: int, _: object) -> None:
        for process in running:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)

    failures: list[int] = []

    def watch(process: subprocess.Popen) -> None:
        if process.wait() != 0 and not failures:
            failures.append(process.returncode)
            for other in running:
                other.terminate()  # the others would wait for it for minutes
                kill_later = threading.Timer(20, other.kill)
                kill_later.daemon = True
                kill_later.start()

    watchers = [threading.Thread(target=watch, args=(process,)) for process in running]
    for thread in watchers:
        thread.start()
    for thread in watchers + relays:
        while thread.is_alive():
            thread.join(0.2)  # short, so that signals are handled
    return failures[0] if failures else 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="simulated devices a process")
    parser.add_argument("command", nargs="+", help="after --, the command every process runs")
    arguments = parser.parse_args()
    if min(arguments.processes, arguments.devices) < 1:
        parser.error("--processes and --devices: at least 1")
    if shutil.which(arguments.command[0]) is None:
        parser.error(f"{arguments.command[0]}: no such command")
    return launch(arguments.command, arguments.processes, arguments.devices)


if __name__ == "__main__":
    sys.exit(main())
