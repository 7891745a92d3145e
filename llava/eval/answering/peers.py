"""What the processes of one launch tell each other at the start: a few messages through a shared store.

The store is torch's `TCPStore` at MASTER_ADDR:MASTER_PORT, in process 0 or, under torchrun and accelerate, in the
launcher. It is asked in a thread of its own, so that the main thread stays open to signals, and nobody waits for the
dead: every process says twice a second that it lives.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from llava.utils import UserError

JOIN_SECONDS = 600.0  # processes of a large job do not start at once
SILENCE_SECONDS = 20.0  # after which a process that says nothing any more counts as gone
PORT_SECONDS = 15.0  # for the port to become free of another launch, or a store that was there to come back
_BEAT = 0.5
_CONNECT_SECONDS = 5.0
_POLL = 0.05
_numbers = itertools.count()

if os.environ.get("WORLD_SIZE", "1") != "1":
    # What broke is said in one line; torch would add a stack of C++ frames for every try. Works before it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


class Peers:
    """Use as a context: `say` and `hear` messages under names, the same ones in every process.

    rank, size: number of this process and how many there are. Everybody watches process 0, which watches all others.

    Raises:
        UserError: from `hear`, when a process whose message is waited for does not come, or is gone.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        try:
            self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError):
            raise UserError("MASTER_ADDR and MASTER_PORT must be set; start with accelerate launch") from None
        self._prefix = f"llava/{next(_numbers)}/"
        self._outbox: dict[str, bytes] = {}
        self._wanted: set[str] = set()
        self._inbox: dict[str, bytes] = {}
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="peers", daemon=True)

    def __enter__(self) -> Peers:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(2 * _BEAT)  # one that hangs in the system must not keep the process

    # --- the main thread ---

    def say(self, name: str, value: Any) -> None:
        """Makes a message (anything that JSON can hold) known to all."""
        with self._lock:
            self._outbox[name] = json.dumps(value).encode()

    def hear(self, names: Mapping[str, int], patience: float | None = None) -> dict[str, Any]:
        """Waits for messages, name -> the process that sends it.

        patience: seconds after which what has come is returned; None waits as long as the senders live.
        """
        with self._lock:
            self._wanted |= set(names)
        started = time.monotonic()
        while True:
            with self._lock:
                found = {name: self._inbox[name] for name in names if name in self._inbox}
                failure, beats = self._failure, dict(self._beats)
            waited = time.monotonic() - started
            if len(found) == len(names) or (patience is not None and (waited > patience or failure)):
                return {name: json.loads(data) for name, data in found.items()}
            if failure is not None:
                raise UserError(f"the processes could not share out the work: {failure}")
            for rank in {rank for name, rank in names.items() if name not in found}:
                self._require_alive(rank, beats.get(rank), waited)
            time.sleep(_POLL)

    def _require_alive(self, rank: int, beat: tuple[bytes, float] | None, waited: float) -> None:
        if beat is None and waited > JOIN_SECONDS:
            raise UserError(f"process {rank} of {self.size} has not started within {JOIN_SECONDS:.0f} s")
        if beat is not None and time.monotonic() - beat[1] > SILENCE_SECONDS:
            raise UserError(
                f"the processes could not share out the work: process {rank} of {self.size} is gone "
                f"(silent for {SILENCE_SECONDS:.0f} s)"
            )

    # --- the other thread ---

    def _serve(self) -> None:
        try:
            store = self._connect()
            beaten = 0.0
            counter = 0
            while store is not None and not self._ended.wait(_POLL):
                self._exchange(store)
                if time.monotonic() - beaten > _BEAT:
                    counter, beaten = counter + 1, time.monotonic()
                    store.set(f"{self._prefix}beat/{self.rank}", str(counter))
                    self._listen(store, range(1, self.size) if self.rank == 0 else (0,))
            if store is not None:
                self._exchange(store)
        except Exception as error:  # whatever torch raises for a connection that broke
            reason = " ".join(str(error).split())[:150]
            with self._lock:
                self._failure = f"the connection to process 0 broke; did it end? ({reason})"

    def _exchange(self, store: Any) -> None:
        with self._lock:
            sending, self._outbox = self._outbox, {}
            missing = [name for name in self._wanted if name not in self._inbox]
        for name, data in sending.items():
            store.set(self._prefix + name, data)
        for name in missing:
            if store.check([self._prefix + name]):
                data = store.get(self._prefix + name)
                with self._lock:
                    self._inbox[name] = data

    def _listen(self, store: Any, ranks: Iterable[int]) -> None:
        for rank in ranks:
            key = f"{self._prefix}beat/{rank}"
            if store.check([key]):
                beat = store.get(key)
                with self._lock:
                    if self._beats.get(rank, (None,))[0] != beat:
                        self._beats[rank] = beat, time.monotonic()

    def _connect(self) -> Any:
        """The store of this launch, as torch's `env://` finds it; None if this end is closed before it is there.

        A store in which somebody else has our number is another launch's, which will leave the port soon.
        """
        from torch.distributed import PrefixStore, TCPStore

        host, port = self._address
        in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        is_master = self.rank == 0 and not in_launcher
        seconds = timedelta(seconds=_CONNECT_SECONDS)
        started = time.monotonic()
        refused: float | None = None
        while not self._ended.is_set():
            if not is_master and not self._answers(host, port):
                gone = refused is not None and time.monotonic() - refused > PORT_SECONDS
                if gone or time.monotonic() - started > JOIN_SECONDS:
                    raise TimeoutError(f"nobody answers at {host}:{port}" + (" any more" if gone else ""))
                self._ended.wait(4 * _POLL)
                continue
            try:
                store: Any = TCPStore(host, port, self.size, is_master, timeout=seconds, wait_for_workers=False)
                if in_launcher:
                    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                    store = PrefixStore(f"/worker/attempt_{attempt}", store)
                if store.add(f"{self._prefix}claim/{self.rank}", 1) == 1:
                    return store
                problem = f"another launch with a process {self.rank} is at {host}:{port}"
            except RuntimeError as error:
                problem = str(error)
            store = None
            refused = refused or time.monotonic()
            if time.monotonic() - refused > PORT_SECONDS:
                raise RuntimeError(problem)
            self._ended.wait(10 * _POLL)
        return None

    @staticmethod
    def _answers(host: str, port: int) -> bool:
        # torch's own waiting cannot be interrupted, and complains at every try.
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return True
        return False
