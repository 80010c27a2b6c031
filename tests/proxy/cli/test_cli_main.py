"""The command line: help that helps, exit codes that mean one thing, and no traceback for an interrupt."""

import argparse
import subprocess
import sys
from types import ModuleType

import pytest
import trio

from proxy.cli.main import COMMANDS, main


def with_command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Puts a command ``config`` in place whose ``run`` is this."""
    module = ModuleType("command")
    module.add_parser = lambda subparsers: subparsers.add_parser("config")  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setattr(sys.modules[main.__module__], "import_module", lambda name: module)


def test_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n    {name} " in text
    assert "exit codes: 0 done, 1 failed, 2 misuse" in text
    assert "examples:" in text


@pytest.mark.parametrize("argv", [[], ["confg"], ["--wat"], ["config"], ["config", "check", "--set", "x"]])
def test_misuse_is_exit_code_2_and_says_how(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: steadyread")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("steadyread ")


@pytest.mark.parametrize("code", [0, 1])
def test_the_command_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with_command(monkeypatch, lambda arguments: code)
    assert main(["config"]) == code


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a nursery has wrapped it, unless something else failed as well."""

    def interrupt(arguments: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    def interrupt_in_nursery(arguments: argparse.Namespace) -> int:
        async def work() -> None:
            raise BaseExceptionGroup("", [KeyboardInterrupt()])

        trio.run(work)
        raise AssertionError("unreachable")

    def interrupt_and_fail(arguments: argparse.Namespace) -> int:
        raise BaseExceptionGroup("", [KeyboardInterrupt(), KeyError("x")])

    with_command(monkeypatch, interrupt)
    assert main(["config"]) == 130
    with_command(monkeypatch, interrupt_in_nursery)
    assert main(["config"]) == 130
    with_command(monkeypatch, interrupt_and_fail)
    with pytest.RaisesGroup(KeyboardInterrupt, KeyError):
        main(["config"])


def test_a_reader_that_left_is_no_traceback() -> None:
    """``steadyread config show | head -1``, with a reader that has gone before the first byte."""
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy", "config", "show"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait() == 1


def test_config_imports_neither_trio_nor_the_servers() -> None:
    """Start-up is quick: a command pays only for what it needs."""
    code = (
        "import sys; from proxy.cli import main; main(['config', 'check']);"
        "print([name for name in ('trio', 'h11', 'rich', 'prometheus_client') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "The settings are usable.\n[]\n"
