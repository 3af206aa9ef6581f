"""``edgeserve init``: the shipped configuration files, for the user to edit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from serve_app.cli.console import stdout, writing
from serve_app.config.default_files import SHIPPED, shipped_file
from serve_app.config.yaml_files import read_text
from serve_app.errors import EdgeServeError

#: ``deploy/NAME`` as the shipped files name each other, and Ray's file, which is ``cluster.yaml`` in the repository.
_SHIPPED_NAME = re.compile(r"deploy/(?P<own>cluster\.yaml\b)?|(?P<ray>\bcluster\.yaml\b)")


@click.command()
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(file_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def init(folder: Path, force: bool) -> None:
    """Write configuration files to edit into DIR, or into the working directory.

    \b
    local.yaml, edge.yaml, catalog.yaml   locations on one machine: edgeserve up
    edge-catalog.yaml, models/            models of text, sound, boxes, masks, files and tables
    cluster.yaml, cluster-edge.yaml       locations on hosts of their own
    ray-cluster.yaml, stop-ray.sh         the hosts themselves: ray up ray-cluster.yaml
    redis.conf, prometheus/               what a cluster that outlives its head needs; monitoring
    """
    existing = [folder / name for name in SHIPPED if (folder / name).exists()]
    if existing and not force:
        raise EdgeServeError(f"{existing[0]} exists and is left as it is; --force overwrites it")
    # All of them before any is written: in a checkout they may be written over one another.
    contents = {name: _content(name) for name in SHIPPED}
    for name, content in contents.items():
        path = folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    is_here = folder.absolute() == Path.cwd()
    command = "edgeserve up" if is_here else f"edgeserve up {shlex.quote(str(folder / 'local.yaml'))}"
    stdout().print(f"start the locations of {folder / 'local.yaml'} with: {command}", markup=False)


def _content(name: str) -> bytes:
    path = shipped_file(name)
    return path.read_bytes() if path.suffix == ".onnx" else _for_one_folder(read_text(path)).encode()


def _for_one_folder(text: str) -> str:
    """Let the files name each other in one folder, instead of ``deploy/`` and the folder above it."""
    return _SHIPPED_NAME.sub(lambda found: found["own"] or ("ray-cluster.yaml" if found["ray"] else ""), text)
