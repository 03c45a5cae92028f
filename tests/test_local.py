"""What tests rely on: servers that end, ports that stay free, processes that are known to have ended."""

import http.server
import os
import subprocess
import sys
import time
from contextlib import suppress
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.local import free_port, running, serving


def test_a_server_ends_with_a_test_that_fails():
    with suppress(ZeroDivisionError), serving(http.server.SimpleHTTPRequestHandler) as port:
        assert urlopen(f"http://127.0.0.1:{port}/", timeout=10).status == 200
        raise ZeroDivisionError
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{port}/", timeout=10)


def test_a_process_that_has_ended_does_not_run():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert running(process.pid)
    process.stdin.close()
    end = time.monotonic() + 60
    while running(process.pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert os.path.exists(f"/proc/{process.pid}")  # nobody has asked yet how it ended
    process.wait()
    assert not running(process.pid)


def test_ports_are_none_that_linux_gives():
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        low, high = (int(number) for number in file.read().split())
    if (low, high) != (32768, 60999):
        pytest.skip("this machine gives other ports than Linux does by default")
    assert all(20000 <= free_port() < low for _ in range(20))
