"""The cache's settings, and the flag that names a memcached."""

from __future__ import annotations

import argparse

import pytest

from proxy.cli.settings_options import add_setting_flags, load_from
from proxy.settings import CacheSettings
from proxy.settings.cache import memcached_address
from proxy.settings.load import SettingsError
from routing.topology import Address


def load_with(*flags: str) -> CacheSettings:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser)
    return load_from(parser.parse_args(flags)).settings.cache


def test_the_flag_names_a_memcached() -> None:
    assert memcached_address(load_with()) is None
    assert memcached_address(load_with("--memcached", "10.0.0.20:11211")) == Address("10.0.0.20", 11211)


@pytest.mark.parametrize("wrong", ["10.0.0.20", "10.0.0.20:0", "memcached://10.0.0.20:11211", ":11211"])
def test_what_is_no_address_is_refused_with_what_is(wrong: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_with("--memcached", wrong)
    [problem] = refused.value.problems
    assert problem.setting == "cache.memcached"
    assert "give " in problem.message
