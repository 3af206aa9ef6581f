"""The example with NVIDIA's ``tritonclient``: a client that was not written for EdgeServe works unchanged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "examples" / "triton_client" / "classify.py"

# The name of the distribution in the extra `test`; where it has no wheel, this says so.
pytest.importorskip("tritonclient", reason="tritonclient is not installed")


@pytest.mark.parametrize("path", ["/paris", "/tokyo", ""])
def test_tritonclient_gets_its_answer_from_every_address(deployment, path: str) -> None:
    address = deployment.url.removeprefix("http://") + path
    command = [sys.executable, str(SCRIPT), "--url", address, "--model", "squeezenet1_1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("squeezenet1_1: classes ")


def test_a_model_that_does_not_exist_is_an_error_in_one_sentence(deployment) -> None:
    address = deployment.url.removeprefix("http://")
    command = [sys.executable, str(SCRIPT), "--url", f"{address}/paris", "--model", "absent"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode != 0
    assert "absent" in ran.stderr
