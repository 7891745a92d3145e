"""An interpreter that has torch and transformers loaded already and forks for every command, for tests of scripts.

A script that is given `interpreter(...)` as PYTHON runs its commands as always, each in a process of its own, but does
not pay four seconds of imports for each. Only imports are shared; the modules under test are run as `-m` does.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

_CLIENT = """#!{python} -IS
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(s, [len(request).to_bytes(4, "big")], [0, 1, 2])
s.sendall(request)
sys.exit(int(s.recv(16) or b"70"))
"""


def _receive(connection):
    head, fds, _, _ = socket.recv_fds(connection, 4, 3)
    size, data = int.from_bytes(head, "big"), b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    return json.loads(data), fds


def _run(arguments):
    if arguments[0] == "-c":
        exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _child(request, fds):
    arguments, folder, environment = request
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [part for part in environment.get("PYTHONPATH", "").split(":") if part]
    # Python's own streams may be the test runner's; the child writes to the descriptors it was given.
    sys.stdin = open(0, encoding="utf-8")
    sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", buffering=1) for fd in (1, 2))
    try:
        _run(arguments)
        return 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return int(error.code) if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()


def _serve(listener):
    # Imported once, inherited by every child. None of these is run by a script with -m.
    import torch
    import transformers  # noqa: F401
    from transformers import CLIPVisionModel, LlamaForCausalLM  # noqa: F401

    import llava.eval.answering.answerer
    import llava.model.builder
    import llava.pruning  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True:
        connection, _ = listener.accept()
        try:
            request, fds = _receive(connection)
        except (OSError, ValueError):
            connection.close()
            continue
        if not fds:  # the caller went away
            connection.close()
            continue
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            listener.close()
            status = 1
            try:
                status = _child(request, fds)
            finally:
                with contextlib.suppress(OSError):
                    connection.sendall(str(status).encode())
                os._exit(0)
        for fd in fds:
            os.close(fd)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


@contextlib.contextmanager
def interpreter(folder: Path):
    """Path of an executable that takes what `python` takes (`-c`, `-m`, a script) while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="fork") as short:  # the path of a socket must be short
        address = os.path.join(short, "socket")
        client = folder / "python with a head start"
        client.write_text(_CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen([sys.executable, __file__, address], env=environment)
        try:
            deadline = time.monotonic() + 120
            while not os.path.exists(address):
                assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.05)
            yield client
        finally:
            server.terminate()
            server.wait()


def main(address):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(16)
    os.rename(f"{address}.new", address)  # there only when it answers
    _serve(listener)


if __name__ == "__main__":
    main(sys.argv[1])
