"""Environment variables; no other module reads them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

#: Overrides the store directory of every configuration.
STORE_VARIABLE = "EDGESERVE_STORE"


def preset(variables: Mapping[str, str]) -> None:
    """Set environment variables for this process and its children, except those that the user has set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process: this process's own, and ``extra`` for variables that are not set."""
    return {**extra, **os.environ}


def ray_address() -> str | None:
    """The address of the Ray cluster to join, if the user has set one."""
    return os.environ.get("RAY_ADDRESS") or None


def has_ray_token() -> bool:
    """Whether Ray finds an authentication token for this user."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()


def traces_dir() -> Path | None:
    """The folder of recorded traces, if the user has set one."""
    named = os.environ.get("EDGESERVE_TRACES")
    return Path(named).expanduser() if named else None


def ray_temp_dir() -> Path:
    """The folder that holds Ray's own, ``ray``, on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def sockets_dir() -> Path:
    """The folder of the sockets on which this user's workers listen for routers; socket paths must be short."""
    return ray_temp_dir() / f"edgeserve-{os.getuid()}"


def downloads_dir() -> Path:
    """The folder in which files of models are kept once they are downloaded."""
    return state_dir() / "downloads"


def ca_bundle() -> Path | None:
    """The certificates of the authorities to trust, where the user has named them for Python's HTTP libraries.

    OpenSSL itself reads ``SSL_CERT_FILE``.
    """
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    return Path(named) if named and not os.environ.get("SSL_CERT_FILE") else None


def state_dir() -> Path:
    """The folder in which ``edgeserve up`` records what it has started for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "edgeserve"
