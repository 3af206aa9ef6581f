"""What the consoles of all commands print."""

from __future__ import annotations

import pytest

from serve_app.cli.console import stderr, stdout


@pytest.mark.parametrize("console", [stdout, stderr])
def test_builders_of_packages_are_printed_as_they_are_written(console, capsys: pytest.CaptureFixture[str]) -> None:
    console().print("onnx:package:magika/model.onnx")
    captured = capsys.readouterr()
    assert "onnx:package:magika/model.onnx" in captured.out + captured.err
