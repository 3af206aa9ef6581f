"""Wheels of the project, and virtual environments in which they are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIMULATOR = ROOT / "deploy" / "simulator"

_COMMAND_S = 300.0


def build_wheel(project: Path, target: Path) -> Path:
    """Build the wheel of a folder that has a ``pyproject.toml``; nothing is downloaded."""
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(target), cwd=project)
    (wheel,) = target.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Installation:
    """A virtual environment with one wheel, and the folder in which its commands run."""

    folder: Path
    work: Path
    environment: dict[str, str]

    @property
    def site_packages(self) -> Path:
        """Where the wheel is installed."""
        (found,) = (self.folder / "lib").glob("python*/site-packages")
        return found

    def python(self, script: str) -> str:
        """Output of a Python script that must succeed."""
        return run(str(self.folder / "bin" / "python"), "-c", script, cwd=self.work, env=self.environment).stdout

    def edgeserve(self, *arguments: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
        """Run the installed command; it must succeed, or fail."""
        command = (str(self.folder / "bin" / "edgeserve"), *arguments)
        return run(*command, cwd=self.work, env=self.environment, fails=fails)


def install(wheel: Path, folder: Path, *, dependencies: bool, variables: dict[str, str]) -> Installation:
    """Install a wheel in a new virtual environment.

    Args:
        wheel: the wheel.
        folder: where the environment and its working directory are made.
        dependencies: install them from the index; otherwise, use those of this environment.
        variables: added to the environment of commands.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EDGESERVE_", "PYTHON"))}
    made = Installation(folder=folder / "venv", work=folder / "work", environment={**kept, **variables})
    made.work.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", str(made.folder))
    options = () if dependencies else ("--no-deps", "--no-index")
    pip = (sys.executable, "-m", "pip", "--python", str(made.folder / "bin" / "python"), "--disable-pip-version-check")
    run(*pip, "install", "--quiet", *options, str(wheel))
    if not dependencies:
        # Only packages are found there: an editable installation of the project is a .pth, and is not followed.
        (made.site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


def run(
    *command: str, cwd: Path | None = None, env: dict[str, str] | None = None, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed, or fail."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    assert (done.returncode != 0) == fails, f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}"
    return done
