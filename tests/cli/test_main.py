"""``edgeserve`` itself, whose subcommands are imported only when they are used."""

from __future__ import annotations

import click
import pytest

from serve_app.cli.main import main


@pytest.mark.skipif(not hasattr(click, "NoSuchCommand"), reason="this version of click suggests no commands")
def test_a_misspelled_command_is_answered_with_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["publich"])
    assert ended.value.code == 2
    assert "No such command 'publich'. Did you mean 'publish'?" in capsys.readouterr().err
