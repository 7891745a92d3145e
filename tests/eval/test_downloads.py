"""Pictures from addresses: where redirects may lead, how long and how large a download may be."""

import http.server
import io
import socket
import threading
import time

import pytest
from PIL import Image

from llava.eval.answering import chat
from llava.eval.answering.chat import load_image
from llava.eval.common import downloads
from llava.eval.run_llava import main
from llava.utils import UserError
from tests.eval.helpers import fails_with_one_line


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    """Serves a picture, redirects to what the query says, and drips."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path.startswith("/go?"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/go?"))
                self.end_headers()
                return
            if self.path == "/drip":  # a byte now and then: no silence, no end
                self.send_response(200)
                self.end_headers()
                try:
                    for _ in range(100):
                        self.wfile.write(b"x")
                        self.wfile.flush()
                        time.sleep(0.05)
                except OSError:
                    pass
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture())

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        serving.daemon_threads = True
        threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def test_what_the_user_typed_is_fetched_wherever_it_lies(server):
    assert load_image(f"{server}/a.png").size == (5, 4)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]"])
def test_redirects_to_this_machine_are_refused_unless_asked_for(server, host):
    target = server.replace("127.0.0.1", host) + "/a.png"
    with pytest.raises(UserError, match=r"redirects to .*not a public address.*--allow-private-redirects"):
        load_image(f"{server}/go?{target}")
    if host in ("127.0.0.1", "localhost"):
        assert load_image(f"{server}/go?{target}", private_redirects=True).size == (5, 4)


@pytest.mark.parametrize("target", ["/a.png", "//127.0.0.1/a.png"])
def test_relative_redirects_lead_to_the_same_machine(server, target):
    with pytest.raises(UserError, match="not a public address"):
        load_image(f"{server}/go?{target}")


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://example.org/a.png", "gopher://x/", "javascript:1"])
@pytest.mark.parametrize("private", [False, True])
def test_redirects_to_other_schemes_are_refused_always(server, target, private):
    with pytest.raises(UserError, match="(?i)redirect"):
        load_image(f"{server}/go?{target}", private_redirects=private)


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1", "fe80::1"]
    + ["fc00::1", "::ffff:10.0.0.1", "2002:a00:1::", "fe80::1%eth0"],
)
def test_addresses_that_are_not_public(address, monkeypatch):
    # A name is judged by all that it stands for.
    def found(host, port, **options):
        return [(socket.AF_INET, 1, 6, "", (each, 0)) for each in ("93.184.215.14", address)]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert not downloads.is_public("pictures.example.org")


def test_public_addresses(monkeypatch):
    assert downloads.is_public("93.184.215.14") and downloads.is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")
    assert not downloads.is_public("printer.local") and not downloads.is_public("LOCALHOST.")

    def unknown(*args, **options):
        raise socket.gaierror(-2, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert downloads.is_public("unknown.example.org"), "a proxy may know it"


def test_a_download_has_a_deadline_and_a_size(server, monkeypatch):
    monkeypatch.setattr(chat, "URL_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"drip cannot be read \(not there within 0.5 seconds\)"):
        load_image(f"{server}/drip")
    assert time.monotonic() - started < 2
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        with pytest.raises(UserError, match="not there within|timed out"):
            load_image(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")
    monkeypatch.setattr(chat, "URL_SECONDS", 30)
    monkeypatch.setattr(chat, "URL_BYTES", 20)
    with pytest.raises(UserError, match="more than 0 MiB"):
        load_image(f"{server}/a.png")


def test_the_flag_reaches_the_download(server, data, capsys, monkeypatch):
    def stop(args):
        raise UserError("the model would be loaded now")

    monkeypatch.setattr("llava.eval.answering.loading.load_model", stop)
    argv = ["--model-path", "llava-v1.5", "--query", "What?", "--image-file", f"{server}/go?{server}/a.png"]
    fails_with_one_line(main, argv, capsys, "--allow-private-redirects")
    fails_with_one_line(main, [*argv, "--allow-private-redirects"], capsys, "would be loaded now")
