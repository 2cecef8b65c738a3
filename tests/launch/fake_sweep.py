"""launch/sweep.py with runs that take no time: this file, too, run as `fake_sweep.py RUN CONFIG`.

A run notes in `calls.txt` of the members' folder when it starts, is stopped and finishes.
Variables: FAIL=TEXT:STATUS ends those with TEXT in their name so, FAIL_ONCE the first start of
each; SECONDS is how long a run takes.
"""

import os
import pathlib
import signal
import sys
import time

HERE = pathlib.Path(__file__)


def note(folder, what):
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    with open(folder.parent / "calls.txt", "a") as file:
        file.write(f"{what} {folder.name} {cores}\n")


def run(folder, config):
    def stop(number, _):
        note(folder, "stopped")
        sys.exit(42)

    signal.signal(signal.SIGTERM, stop)
    note(folder, "started")
    for variable in ("FAIL", "FAIL_ONCE"):
        text, _, status = os.environ.get(variable, "").partition(":")
        once = variable == "FAIL_ONCE" and (folder / "failed").exists()
        if status and text in folder.name and not once:
            (folder / "failed").touch()
            print("error: as it was told")
            sys.exit(int(status))
    time.sleep(float(os.environ.get("SECONDS", 0)))
    (folder / "config.json").write_text(config)
    (folder / "results.json").write_text("{}")
    (folder / "export").mkdir()
    note(folder, "finished")


def sweep():
    sys.path.insert(0, str(HERE.parents[2] / "launch"))
    import sweep

    def command(self, python="python"):
        return [python, str(HERE), "RUN", str(self.folder), self.config.to_json()]

    sweep.Run.command = command
    sys.exit(sweep.main())


if __name__ == "__main__":
    if sys.argv[1] == "RUN":
        run(pathlib.Path(sys.argv[2]), sys.argv[3])
    else:
        sweep()
