import hashlib
import io
import logging as python_logging
import os
import signal
import sys
import threading
import time

import pytest
from absl import logging
from program import hear_ctrl_c

from mae_jax import cli
from mae_jax.train.progress import Progress, with_clock


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """What is left to see: of each line, what was written after the last return."""
        lines = self.getvalue().split("\n")
        return [line.rstrip("\r").split("\r")[-1].rstrip() for line in lines]


@pytest.fixture
def on_terminal(monkeypatch):
    """Called in a test, as pytest sets stderr anew for each of its phases."""
    handlers = list(python_logging.root.handlers)

    def start():
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        cli.set_up_logging()
        return terminal

    yield start
    python_logging.root.handlers[:] = handlers


def test_log_lines_stand_above_the_bar(on_terminal):
    terminal = on_terminal()
    with Progress(0, 400) as bar:
        bar.advance()
        logging.warning("step 1: eval loss 1.0")
        bar.show("loss 1.5342  lr 6.56e-05  51 img/s  data wait 0%", 1, 0.1)
        bar.advance()
        logging.warning("a picture was passed over")
    lines = terminal.screen()
    assert [line[9:] for line in lines[:2]] == [  # after the time
        "step 1: eval loss 1.0",
        "a picture was passed over",
    ]
    assert lines[2].startswith("  0%|")
    assert lines[2].endswith("loss 1.5342  lr 6.56e-05  51 img/s  data wait 0%]")
    assert len(lines[2]) <= 100


def test_slow_work_shows_its_seconds_and_gives_its_result(on_terminal):
    terminal = on_terminal()

    def work():
        time.sleep(1.3)
        return 3

    assert with_clock("compiling", work) == 3
    assert "compiling 00:01" in terminal.getvalue()
    assert terminal.screen() == [""]  # nothing is left of it


def test_an_error_of_slow_work_is_raised():
    def work():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        with_clock("compiling", work)


def test_ctrl_c_is_obeyed_during_work_that_never_looks_up():
    """As a compiler's: one call into C, in which Python does not hear of signals."""
    hear_ctrl_c()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        with_clock("compiling", lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000))
    assert time.monotonic() - start < 3.0
