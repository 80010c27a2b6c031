"""A log line is one JSON object, or one readable line, and never holds a payload or a password."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from proxy import log
from routing.topology import Address, Role


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def configured(level: str, is_human: bool = False) -> io.StringIO:
    stream = io.StringIO()
    log.configure(level, stream=stream, is_human=is_human)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_a_json_object_with_time_level_event_and_fields() -> None:
    stream = configured("info")
    before = datetime.now(UTC)
    log.get_logger("proxy.x").info(
        "node_connected", node=Address("::1", 7), role=Role.PRIMARY, count=3, ratio=float("nan"), ids=(1, 2)
    )
    [line] = lines(stream)
    time = str(line.pop("time"))
    assert time.endswith("Z")
    assert abs((datetime.fromisoformat(time) - before).total_seconds()) < 5
    assert line == {
        "level": "info",
        "event": "node_connected",
        "logger": "proxy.x",
        "node": "[::1]:7",
        "role": "primary",
        "count": 3,
        "ratio": "nan",
        "ids": [1, 2],
    }


def test_only_the_level_and_above_is_written() -> None:
    stream = configured("warning")
    logger = log.get_logger("proxy.x")
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    logger.error("d")
    assert [line["event"] for line in lines(stream)] == ["c", "d"]
    assert [logger.is_enabled_for(level) for level in log.LEVELS] == [False, False, True, True]


def test_payloads_and_secrets_are_not_written() -> None:
    for is_human in (False, True):
        stream = configured("debug", is_human)
        log.get_logger("proxy.x").error(
            "e",
            request=b"hunter2",
            buffer=[bytearray(b"hunter2")],
            admin_token="hunter2",
            password="hunter2",
            settings={"password": "hunter2"},
        )
        assert "hunter2" not in stream.getvalue()
        assert "<7 bytes>" in stream.getvalue()


def test_no_text_breaks_the_line() -> None:
    for is_human in (False, True):
        stream = configured("info", is_human)
        log.get_logger("proxy.x").info("e", text="a\nb\r\x1b[31m\u2028" + "x" * 100_000)
        assert len(stream.getvalue().splitlines()) == 1
        assert "\x1b" not in stream.getvalue()
        assert len(stream.getvalue()) < 6000


def test_a_field_cannot_replace_what_each_line_has() -> None:
    stream = configured("info")
    log.get_logger("proxy.x").info("real", level="fake", time=1)
    [line] = lines(stream)
    assert (line["event"], line["level"], line["level_"], line["time_"]) == ("real", "info", "fake", 1)


def test_an_exception_keeps_its_traceback_in_the_same_line() -> None:
    stream = configured("info")
    try:
        raise OSError("gone")
    except OSError as error:
        log.get_logger("proxy.x").exception("failed", reason=error)
    [line] = lines(stream)
    assert line["reason"] == "OSError: gone"
    assert str(line["exception"]).startswith("Traceback")


def test_other_libraries_come_out_in_the_same_form() -> None:
    stream = configured("info")
    logging.getLogger("trio").warning("accept failed: %s", "EMFILE")
    [line] = lines(stream)
    assert (line["event"], line["logger"], line["message"]) == ("log", "trio", "accept failed: EMFILE")


def test_a_person_gets_a_readable_line() -> None:
    stream = configured("info", is_human=True)
    log.get_logger("proxy.x").warning("node_lost", node=Address("h", 7), reason="it is gone")
    assert stream.getvalue()[12:] == ' warning node_lost node=h:7 reason="it is gone"\n'


def test_configuring_again_replaces_the_last() -> None:
    first, second = configured("info"), configured("info")
    log.get_logger("proxy.x").info("once")
    assert first.getvalue() == ""
    assert len(lines(second)) == 1
