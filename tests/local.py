"""Servers, ports and processes of this machine, for tests."""

import random
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer

import psutil


@contextmanager
def serving(handler, context=None):
    """Port of an HTTP server on loopback, with TLS where there is a context; it is gone however the test ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def free_port():
    """A port that nobody is given until it is used: below those that Linux gives, above those of Ray's workers."""
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as found, suppress(OSError):
            found.bind(("", port))
            return port
    raise OSError("no free port in a hundred")


def tree(pid):
    """A process and all that it has started; nothing where it has ended."""
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def running(pid):
    """Whether a process has not ended. One that has ended keeps its number until its parent asks how."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
