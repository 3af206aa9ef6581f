"""What ``loadtests.base`` reads of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.base import Usage, of_kinds, total, usage


def test_a_process_takes_memory_of_its_own_within_its_share() -> None:
    own = usage(os.getpid())
    assert 0 < own.private_dirty <= own.pss
    assert own.processes == 1


@pytest.mark.slow
def test_processes_are_found_by_the_folder_that_their_environment_names(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('up', flush=True); input()"]
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = of_kinds(tmp_path)
        process.communicate(b"\n")
    assert {kind: each.processes for kind, each in found.items()} == {"the rest of Ray and Serve": 1}
    assert of_kinds(tmp_path) == {}
    assert total(found) == Usage() + found["the rest of Ray and Serve"]
