"""``steadyread config`` checks and shows what the other commands would run with."""

import json
import tomllib
from pathlib import Path

import pytest

from proxy.cli.main import main


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STEADYREAD_CONFIG", "STEADYREAD_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def test_show_writes_a_file_that_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show"]) == 0
    file = tmp_path / "steadyread.toml"
    file.write_text(capsys.readouterr().out)
    assert main(["config", "check", "--config", str(file)]) == 0
    assert capsys.readouterr().out == "The settings are usable.\n"


def test_check_names_every_problem_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.toml"
    file.write_text('log_level = "loud"\n\n[cluster]\nseds = []\n')
    assert main(["config", "check", "--config", str(file)]) == 1
    assert capsys.readouterr() == (
        "",
        "steadyread: 2 problems in the settings\n"
        f'  {file}:1: log_level = "loud": give one of "debug", "info", "warning", "error"\n'
        f'  {file}:4: cluster.seds: unknown setting; did you mean "seeds"?\n',
    )
    assert main(["config", "check", "--config", str(file), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is False
    assert facts["problems"][1] == {
        "origin": f"{file}:4",
        "line": 4,
        "setting": "cluster.seds",
        "value": None,
        "message": 'unknown setting; did you mean "seeds"?',
    }


def test_show_takes_flags_and_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEADYREAD_LOG_LEVEL", "debug")
    flags = ["--seed", "a:1", "--seed", "b:2", "--listen", "h:3", "--admin", "[::1]:4"]
    assert main(["config", "show", *flags, "--set", "clients.connections_max=5"]) == 0
    text = capsys.readouterr().out
    shown = tomllib.loads(text)
    assert shown["log_level"] == "debug"
    assert shown["cluster"]["seeds"] == ["a:1", "b:2"]
    assert [listener["address"] for listener in shown["listeners"]] == ["h:3"]
    assert shown["admin"]["address"] == "[::1]:4"
    assert 'seeds = ["a:1", "b:2"]  # command line --seed\n' in text
    assert "connections_max = 5  # command line --set clients.connections_max\n" in text
    assert main(["config", "show", "--json"]) == 0
    [fact] = [
        fact for fact in json.loads(capsys.readouterr().out)["settings"] if fact["setting"] == "log_level"
    ]
    assert (fact["value"], fact["origin"]) == ("debug", "environment STEADYREAD_LOG_LEVEL")
