"""What benchmarks hand to other servers is where they take it from."""

from __future__ import annotations

import pytest


# Serve, which is one of the contenders, defines its settings in a way that pydantic no longer recommends.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_model_for_mlserver_is_a_file_beside_its_starter() -> None:
    from loadtests.support.contenders import MLSERVER_MODEL

    compile(MLSERVER_MODEL.read_text(encoding="utf-8"), str(MLSERVER_MODEL), "exec")
