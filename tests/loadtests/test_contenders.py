"""What benchmarks hand to other servers is where they take it from."""

from __future__ import annotations

from loadtests.support.contenders import MLSERVER_MODEL


def test_the_model_for_mlserver_is_a_file_beside_its_starter() -> None:
    compile(MLSERVER_MODEL.read_text(encoding="utf-8"), str(MLSERVER_MODEL), "exec")
