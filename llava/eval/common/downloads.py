"""Pictures from http(s) addresses: bounded in time and size, and not led astray.

The address comes from the user, who may mean a server of their own. Where that server sends us on is not theirs to
know: a redirect must lead to http(s) and to a public address, or it could fetch from services that trust this machine.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import urllib.request
from typing import Any
from urllib.parse import urlsplit

_CHUNK = 1 << 16


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to public http(s) addresses, or to any http(s) address if `private` ones are asked for."""

    def __init__(self, private: bool) -> None:
        self.private = private

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        parts = urlsplit(newurl)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"it redirects to {newurl}, which is no http(s) address")
        if not self.private and not is_public(parts.hostname):
            raise ValueError(
                f"it redirects to {parts.hostname}, which is not a public address: give the final address yourself, or "
                "--allow-private-redirects"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_public(host: str) -> bool:
    """Whether everything that a host name or address stands for is reachable for all the world.

    A name that cannot be resolved here counts as public, unless it says that it is local: a proxy may know it.
    """
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith((".localhost", ".local", ".internal")):
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True
    return all(_is_public_address(str(item[4][0])) for item in found)


def _is_public_address(text: str) -> bool:
    address = ipaddress.ip_address(text.split("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast and (inner is None or inner.is_global)


def fetch(url: str, seconds: float, max_bytes: int, private_redirects: bool = False) -> bytes:
    """What lies at an http(s) address.

    seconds: for all of it, from the look-up of the name to the last byte, redirects included.

    Raises:
        OSError, ValueError: the reason why there is nothing, in words.
    """
    outcome: list[Any] = []
    given_up = threading.Event()

    def work() -> None:
        try:
            outcome.append(_read(url, seconds, max_bytes, private_redirects, given_up))
        except Exception as error:
            outcome.append(error)

    # A name server that does not answer, or a server that sends a byte now and then, cannot be interrupted; what can
    # be is the wait for them.
    thread = threading.Thread(target=work, name="download", daemon=True)
    thread.start()
    thread.join(seconds)
    given_up.set()
    if not outcome:
        raise TimeoutError(f"not there within {seconds:g} seconds")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _read(url: str, seconds: float, max_bytes: int, private_redirects: bool, given_up: threading.Event) -> bytes:
    opener = urllib.request.build_opener(_Redirects(private_redirects))
    request = urllib.request.Request(url, headers={"User-Agent": "llava"})
    data = bytearray()
    with opener.open(request, timeout=seconds) as response:
        while chunk := response.read1(_CHUNK):
            data += chunk
            if len(data) > max_bytes:
                raise ValueError(f"more than {max_bytes >> 20} MiB")
            if given_up.is_set():
                break
    return bytes(data)
