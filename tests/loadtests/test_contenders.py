"""What benchmarks hand to other servers is where they take it from."""

from __future__ import annotations

import ast

import pytest


# Serve, which is one of the contenders, defines its settings in a way that pydantic no longer recommends.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_model_for_mlserver_is_a_file_beside_its_starter() -> None:
    from loadtests.support.contenders import MLSERVER_MODEL

    classes = [
        node.name
        for node in ast.parse(MLSERVER_MODEL.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    # As the settings that MLServer is started with name it.
    assert classes == ["FirstTen"]
