"""The flags that set settings, shared by the commands that use them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from proxy.settings.load import Loaded, Override, SettingsError, load

_FLAG_OF_SETTING = {
    "cluster.seeds": "--seed",
    "listeners": "--listen",
    "admin.address": "--admin",
    "cache.memcached": "--memcached",
}


def add_file_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="the TOML file with the settings (else: $STEADYREAD_CONFIG)",
    )


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """``--config``, and the flags that override single settings."""
    add_file_flag(parser)
    parser.add_argument(
        "--seed",
        metavar="HOST:PORT",
        action="append",
        help="a node of the cluster to ask first; repeat it for more [cluster.seeds]",
    )
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        action="append",
        help="where services connect; repeat it for more; replaces all listeners [listeners]",
    )
    add_admin_flag(parser)
    parser.add_argument(
        "--memcached",
        metavar="HOST:PORT",
        help="a memcached for what is read at snapshots [cache.memcached]",
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        type=_name_and_value,
        help="any other setting, as in --set clients.connections_max=500; lists are written with commas",
    )


def add_admin_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--admin", metavar="HOST:PORT", help="the address of the admin port [admin.address]")


def overrides_of(arguments: argparse.Namespace) -> list[Override]:
    """What the flags of this command line set. Flags that the command does not have set nothing."""
    overrides = [
        Override(setting, value, flag)
        for setting, flag in _FLAG_OF_SETTING.items()
        if (value := getattr(arguments, flag.removeprefix("--"), None)) is not None
    ]
    overrides += [
        Override(name, value, f"--set {name}") for name, value in getattr(arguments, "set", None) or ()
    ]
    return overrides


def load_from(arguments: argparse.Namespace) -> Loaded:
    """The settings from this command line, the environment and the file. Raises SettingsError."""
    return load(file=arguments.config, environment=os.environ, overrides=overrides_of(arguments))


def print_problems(error: SettingsError) -> None:
    """All problems on standard error, one on each line."""
    count = len(error.problems)
    print(f"steadyread: {count} problem{'s' if count > 1 else ''} in the settings", file=sys.stderr)
    for problem in error.problems:
        print(f"  {problem}", file=sys.stderr)


def _name_and_value(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError("give NAME=VALUE, as in log_level=debug")
    return name.strip(), value
