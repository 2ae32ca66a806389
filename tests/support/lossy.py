"""A network of this process's own, in which packets get lost. Needs root and `nft`.

Whatever the process and its children open inside `own_network` is in a network namespace that ends
with them, and its rules with it: nothing outside ever loses a packet.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Network:
    """Packets are dropped where they arrive: who has sent one knows nothing of it."""

    def __init__(self) -> None:
        nft = shutil.which("nft", path=PATH)
        assert nft is not None, "nft is missing: apt-get install nftables"
        self._nft = nft

    def lose(self, ports: Sequence[int], *, percent: int, to: bool, from_: bool) -> None:
        """From now on lose packets `to` these ports, or `from_` them, or both, and no others."""
        these = ", ".join(map(str, ports))
        ways = [way for way, wanted in (("dport", to), ("sport", from_)) if wanted]
        luck = f"numgen random mod 100 < {percent}" if percent < 100 else ""
        rules = "\n".join(f"tcp {way} {{ {these} }} {luck} counter drop" for way in ways)
        chain = f"type filter hook input priority 0\n{rules}\n"
        self._do(f"flush ruleset\ntable inet bad {{\nchain arriving {{\n{chain}}}\n}}\n")

    def lose_nothing(self) -> int:
        """Be a good network again; returns how many packets the rules so far have cost."""
        lost = sum(map(int, re.findall(r"counter packets (\d+)", self._do("list ruleset"))))
        self._do("flush ruleset")
        return lost

    def _do(self, commands: str) -> str:
        command = [self._nft, "--file", "-"]
        done = subprocess.run(command, input=commands, capture_output=True, text=True)
        assert done.returncode == 0, f"nft {commands}: {done.stderr}"
        return done.stdout


@contextmanager
def own_network() -> Iterator[Network]:
    """Let the calling thread, and all that it starts, be alone on a loopback interface."""
    assert os.geteuid() == 0, "a network of its own is made for this test: run it as root"
    network = Network()
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            with socket.socket() as any_socket:
                up = struct.pack("16sh14x", b"lo", IFF_UP)
                fcntl.ioctl(any_socket, SIOCSIFFLAGS, up)
            yield network
        finally:
            assert libc.setns(before, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(before)
