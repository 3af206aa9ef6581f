"""A network switch that takes its time: it stands in for the kernel's bridge once a delay is asked for.

A process in the namespace of the testbed's network. It reads whole frames from the ports of the hosts, keeps each for
half the round trip of the two hosts, and writes it to the port of the other. Segmentation is left to the kernel
(``PACKET_VNET_HDR``): frames of up to 64 KiB come and go as one, which is what makes Python fast enough.

Run by path, with one argument: a JSON file with ``ports`` (MAC address -> port) and ``delays`` (one-way, in seconds;
port -> port -> delay). SIGHUP makes it read the file again. The ``serial`` of what it has taken over is written to the
file of the same name that ends in ``.done``.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

#: From linux/if_packet.h; the socket module does not have them.
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32
_ETH_P_ALL = 0x0003
_BUFFER_BYTES = 64 << 20
#: struct virtio_net_hdr stands before each frame, and the frame begins with the MAC address of its receiver.
_HEADER_BYTES = 10
_FRAME_BYTES = _HEADER_BYTES + (68 << 10)
#: Frames taken from one port before the others, and those that are due, get their turn.
_BURST = 64
#: What a frame meets on a port that is down, or was until now.
_DOWN = (errno.ENETDOWN, errno.ENXIO, errno.ENODEV, errno.ENOBUFS)


class Switch:
    """Forwards frames between ports, each after the delay of the two."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._sockets: dict[str, socket.socket] = {}
        self._names: dict[int, str] = {}
        self._ports: dict[bytes, str] = {}
        self._delays: dict[str, dict[str, float]] = {}
        #: When due, a number that keeps equals in order, port, frame.
        self._under_way: list[tuple[float, int, str, bytes]] = []
        self._count = 0
        self._signals, writer = socket.socketpair()
        writer.setblocking(False)
        signal.signal(signal.SIGHUP, lambda *_: None)
        # A byte for each signal, because a signal alone does not end the waiting.
        signal.set_wakeup_fd(writer.detach())
        self._read_file()

    def _read_file(self) -> None:
        """Take over ports and delays; what is under way arrives when it was to."""
        content = json.loads(self._file.read_text())
        for port in self._sockets.values():
            port.close()
        self._ports = {bytes.fromhex(mac.replace(":", "")): name for mac, name in content["ports"].items()}
        self._sockets = {name: _open(name) for name in self._ports.values()}
        self._names = {port.fileno(): name for name, port in self._sockets.items()}
        self._delays = content["delays"]
        self._file.with_suffix(".done").write_text(content["serial"])

    def step(self) -> None:
        """Wait for a frame to come or to be due, and handle what there is."""
        wait_s = max(0.0, self._under_way[0][0] - time.monotonic()) if self._under_way else None
        readable, _, _ = select.select([self._signals.fileno(), *self._names], [], [], wait_s)
        if self._signals.fileno() in readable:
            self._signals.recv(_BURST)
            self._read_file()
            return
        for descriptor in readable:
            self._receive(self._names[descriptor])
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, name, frame = heapq.heappop(self._under_way)
            self._send(name, frame)

    def _receive(self, source: str) -> None:
        port = self._sockets[source]
        for _ in range(_BURST):
            try:
                frame = port.recv(_FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _DOWN:
                    return
                raise
            now = time.monotonic()
            receiver = self._ports.get(frame[_HEADER_BYTES : _HEADER_BYTES + 6])
            # Broadcasts, such as the question who has an address, go to all.
            for name in (receiver,) if receiver is not None else self._sockets:
                if name != source:
                    self._count += 1
                    due_s = now + self._delays[source][name]
                    heapq.heappush(self._under_way, (due_s, self._count, name, frame))

    def _send(self, name: str, frame: bytes) -> None:
        port = self._sockets.get(name)
        try:
            if port is not None:
                port.send(frame)
        except BlockingIOError:
            pass  # As in any switch, what does not fit is lost.
        except OSError as error:
            if error.errno not in _DOWN:
                raise


def _open(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    for option in (_SO_RCVBUFFORCE, _SO_SNDBUFFORCE):
        port.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    port.setblocking(False)
    port.bind((name, _ETH_P_ALL))
    return port


def main(file: Path) -> None:
    """Run until killed."""
    # A frame that is due must not wait for whoever computes.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    switch = Switch(file)
    while True:
        switch.step()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
