"""A function runs in a process of its own, whose end is a sentence and never the end of its caller."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.errors import StoreError
from serve_app.models.profiling.fresh_process import call_in_fresh_process

pytestmark = pytest.mark.slow


def call(name: str, **arguments: object) -> dict[str, object]:
    return call_in_fresh_process(f"called_apart:{name}", arguments, "model 'x'")


def test_result_comes_back_from_another_process() -> None:
    first, second = call("add", left=1, right=2), call("add", left=3, right=4)
    assert (first["sum"], second["sum"]) == (3, 7)
    assert len({first["process"], second["process"], os.getpid()}) == 3


def test_refusal_is_raised_as_it_is() -> None:
    with pytest.raises(StoreError, match=r"^this is refused; do that$"):
        call("refuse")


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("fail", {}, r"^model 'x' fails .*ValueError: a number is wrong"),
        ("run_out", {}, r"^model 'x' fails .*out of memory"),
        ("leave", {}, r"^model 'x' ends its process \(status 3\)"),
        ("crash", {"number": signal.SIGSEGV}, r"^model 'x' crashes its process \(SIGSEGV\)"),
        ("crash", {"number": signal.SIGKILL}, r"^model 'x' has used up the memory"),
    ],
)
def test_failure_is_a_sentence_and_the_next_call_works(name: str, arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(StoreError, match=sentence) as raised:
        call(name, **arguments)
    assert "\n" not in str(raised.value)
    assert call("add", left=1, right=1)["sum"] == 2


def test_what_a_function_prints_disturbs_nothing() -> None:
    assert call("chatter") == {"said": True}


def test_function_calls_another_process_and_tells_its_caller_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    told: list[dict[str, object]] = []
    outer = call_in_fresh_process("called_apart:add_apart", {"left": 1, "right": 2}, "x", on_told=told.append)
    inner = outer["inner"]
    assert (inner["sum"], told) == (3, [{"adding": [1, 2]}])
    assert len({inner["process"], outer["process"], os.getpid()}) == 3
    assert ("adding", logging.ERROR, "1 and 2") in caplog.record_tuples


def test_crash_of_a_process_that_another_has_called_is_told_to_that_one() -> None:
    said = call("crash_apart")["said"]
    assert str(said).startswith("the inner one crashes its process (SIGABRT)")


def test_caller_that_fails_meanwhile_gets_no_answer_of_an_earlier_call() -> None:
    def fail(told: dict[str, object]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call_in_fresh_process("called_apart:add_apart", {"left": 1, "right": 2}, "x", on_told=fail)
    assert call("add", left=20, right=2)["sum"] == 22


def test_script_without_a_guard_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from serve_app.models.profiling.fresh_process import call_in_fresh_process\n"
        "print(call_in_fresh_process('called_apart:add', {'left': 1, 'right': 2}, 'x')['sum'])\n"
    )
    path = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "3\n", "")
