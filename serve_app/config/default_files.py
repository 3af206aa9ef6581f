"""Where configuration files are: beside the file that names them, in the working directory, or shipped with EdgeServe.

``deploy/NAME`` is the name of a shipped file. A checkout has the shipped files in ``deploy/``, a wheel in
``serve_app/defaults/``; the same names work with both.
"""

from __future__ import annotations

from pathlib import Path

from serve_app.errors import ConfigError

#: Shipped files that are used where the user has none. Those of a cluster are not: they need the user's addresses.
DEFAULTS = ("catalog.yaml", "edge.yaml", "local.yaml")

#: All shipped files, as ``edgeserve init`` writes them: those of one machine, of a cluster, and of its monitoring.
SHIPPED = (
    *DEFAULTS,
    "edge-catalog.yaml",
    "models/iris.onnx",
    "cluster.yaml",
    "cluster-edge.yaml",
    "ray-cluster.yaml",
    "redis.conf",
    "stop-ray.sh",
    "prometheus/prometheus.yml",
    "prometheus/rules.yml",
)

_DEPLOY = "deploy"
_PACKAGE = Path(__file__).parents[1]


def shipped_dir() -> Path:
    """The folder of the shipped configuration files."""
    packaged = _PACKAGE / "defaults"
    return packaged if packaged.is_dir() else _PACKAGE.parent / _DEPLOY


def shipped_file(name: str) -> Path:
    """The place of one of ``SHIPPED``."""
    path = shipped_dir() / name
    # In a checkout, Ray's file is at the top under Ray's usual name.
    return path.parents[1] / "cluster.yaml" if name == "ray-cluster.yaml" and not path.is_file() else path


def find(path: Path, *, named_by: Path | None = None) -> Path:
    """Find a configuration file.

    Args:
        path: as the user wrote it; ``deploy/NAME`` is a shipped file, or the user's own in its place.
        named_by: the file that names it, None on the command line.

    Raises:
        ConfigError: it is in none of the places.
    """
    places = candidates(path, named_by=named_by)
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(f"{path}: no such file; looked for {' and '.join(map(str, places))}")


def resolve(path: Path, *, named_by: Path) -> Path:
    """The file that ``find`` would find; where there is none, its place beside ``named_by``."""
    places = candidates(path, named_by=named_by)
    return next((place for place in places if place.is_file()), places[0])


def find_default(name: str) -> Path:
    """A default file: the working directory's own if it has one, such as ``edgeserve init`` writes, else ``deploy/``.

    Raises:
        ConfigError: it is in none of the places.
    """
    own = Path.cwd() / name
    return own if own.is_file() else find(Path(_DEPLOY, name))


def candidates(path: Path, *, named_by: Path | None = None) -> tuple[Path, ...]:
    """The places of a configuration file, absolute, the first choice first."""
    path = path.expanduser()
    if path.is_absolute():
        return (path,)
    shipped = path.relative_to(_DEPLOY) if path.parts[:1] == (_DEPLOY,) else None
    places = [Path.cwd() / path]
    if named_by is not None:
        # A copy of a shipped file may lie in any folder, together with the files that it names.
        places.insert(0, named_by.absolute().parent / (shipped or path))
    if str(shipped) in DEFAULTS:
        places.append(shipped_dir() / str(shipped))
    return tuple(dict.fromkeys(places))
