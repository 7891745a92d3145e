"""Runs of a tool in forked children: what a kill leaves behind, without importing torch for each of them."""

import contextlib
import os
import signal
import sys
import time

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Child:
    """`function()` in a forked process; its stderr goes to `log`. Exit status as of a script."""

    def __init__(self, function, log, environment=None):
        self.log = log
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            import torch

            # Threads of the parent do not exist here; OpenMP would wait for them.
            torch.set_num_threads(1)
            os.environ.update(environment or {})
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            status = function() or 0
        except SystemExit as exit_info:
            status = exit_info.code or 0
        except BaseException:
            import traceback

            with contextlib.suppress(BaseException):
                traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stderr.flush()
            os._exit(status)

    def running(self):
        if self.pid is None:
            return False
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._ended(status)
        return not pid

    def _ended(self, status):
        self.pid = None
        self.status = os.waitstatus_to_exitcode(status)

    def wait(self, seconds=120):
        """The exit status; negative for a signal. Kills what does not end."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"did not end within {seconds} s: {self.text()}")
            time.sleep(0.002)
        return self.status

    def signal(self, number):
        if self.running():
            os.kill(self.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        return self.wait()

    def text(self):
        with open(self.log, encoding="utf-8") as file:
            return file.read()


def wait_until(condition, child, seconds=60):
    """Polls until `condition()` or the child has ended; says whether the condition came true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if not child.running():
            return condition()
        time.sleep(0.0005)
    raise AssertionError("nothing happened")
