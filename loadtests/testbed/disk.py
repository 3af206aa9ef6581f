"""What a testbed and its hosts find on disk when they boot."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtests.testbed import machine

#: The user of every host: root by another name and with another home, so that root's own stays as it is.
USER = "edgeserve"
PROXY_PORT = 3128
#: Of the environment of who makes a testbed, what its hosts need to install packages the same way.
_HANDED_ON = re.compile(r"PIP_\w+|\w*SSL_CERT_\w+|\w+_CA_BUNDLE|LANG|LC_\w+|TZ")


def make_folder(folder: Path, plan: dict[str, Any]) -> None:
    """Everything that the hosts find on disk when they boot."""
    (folder / "home").mkdir(parents=True)
    # Above all the keys.
    folder.chmod(0o700)
    for key in ("key", "host_key"):
        machine.run(
            "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"testbed {folder.name}", "-f", str(folder / key)
        )
    environment = _environment(folder, ipaddress.IPv4Network(plan["network"]))
    write(folder / "environment.json", json.dumps(environment))
    user = f"{USER}:*:0:0:the user of a testbed:{folder / 'home'}:/bin/bash\n"
    table = "".join(f"{address} {host}\n" for host, address in plan["hosts"].items())
    pip_settings = Path("~/.config/pip/pip.conf").expanduser()
    for host in plan["hosts"]:
        home = folder / "hosts" / host / "home"
        home.mkdir(parents=True)
        (home.parent / "passwd").write_text(user + Path("/etc/passwd").read_text())
        (home.parent / "hosts").write_text(f"127.0.0.1 localhost\n{table}")
        # A login shell sets PATH anew.
        (home / ".profile").write_text(". ~/.bashrc\n")
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        (home / ".bashrc").write_text(exports)
        if pip_settings.is_file():
            (home / ".config" / "pip").mkdir(parents=True)
            shutil.copy(pip_settings, home / ".config" / "pip" / "pip.conf")
    # Last: from now on it can be found.
    write(folder / "testbed.json", json.dumps(plan))


def _environment(folder: Path, network: ipaddress.IPv4Network) -> dict[str, str]:
    """The environment of the hosts: the machine's, as far as it matters for installing packages."""
    handed_on = {name: value for name, value in os.environ.items() if _HANDED_ON.fullmatch(name)}
    upstream = urlsplit(os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY") or "")
    credentials = f"{upstream.netloc.rpartition('@')[0]}@" if "@" in upstream.netloc else ""
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return {
        "PIP_CACHE_DIR": str(Path(cache) / "pip"),
        **handed_on,
        # Of pip alone: other programs, Ray among them, would take it for their way from host to host.
        "PIP_PROXY": f"http://{credentials}{network[1]}:{PROXY_PORT}",
        "PATH": f"{Path(sys.base_prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder / "home"),
        "USER": USER,
        "SHELL": "/bin/bash",
    }


def write(file: Path, content: str) -> None:
    """Whoever reads meanwhile finds the old content or the new."""
    fresh = file.with_name(f".{file.name}")
    fresh.write_text(content)
    fresh.replace(file)
