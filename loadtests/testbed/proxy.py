"""The hosts' way to the outside, for installing packages: an HTTP proxy on the machine's address in the testbed.

Run by path, with the namespace of the testbed (only for others to see), the address to listen at, the network whose
hosts may ask, and, where the machine itself needs one, the proxy to hand everything on to (``host:port``).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import sys
from urllib.parse import urlsplit

_PIECE_BYTES = 1 << 18


class Proxy:
    """Tunnels (``CONNECT``) and plain requests, one for each connection."""

    def __init__(self, clients: ipaddress.IPv4Network, upstream: tuple[str, int] | None) -> None:
        self._clients = clients
        self._upstream = upstream

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one connection of a host."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            if ipaddress.ip_address(writer.get_extra_info("peername")[0]) in self._clients:
                await self._hand_on(reader, writer)
        writer.close()

    async def _hand_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, fields = head.decode("latin-1").partition("\r\n")
        method, target, version = line.split()
        tunnel = method == "CONNECT"
        url = urlsplit(f"//{target}" if tunnel else target)
        host, port = self._upstream or (url.hostname, url.port or (443 if tunnel else 80))
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError as error:
            writer.write(f"HTTP/1.1 502 {error.strerror or 'no such host'}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        try:
            if self._upstream is not None:
                far_writer.write(head)
            elif tunnel:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                path = url._replace(scheme="", netloc="").geturl() or "/"
                ours = ("connection:", "proxy-")
                kept = [field for field in fields.split("\r\n") if not field.lower().startswith(ours)]
                lines = (f"{method} {path} {version}", "Connection: close", *kept)
                far_writer.write("\r\n".join(lines).encode("latin-1"))
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        finally:
            far_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


async def main(_namespace: str, address: str, clients: str, upstream: str | None = None) -> None:
    """Run until killed."""
    host, _, port = (upstream or "").rpartition(":")
    proxy = Proxy(ipaddress.IPv4Network(clients), (host, int(port)) if upstream else None)
    server = await asyncio.start_server(proxy.serve, *address.rsplit(":", 1))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
