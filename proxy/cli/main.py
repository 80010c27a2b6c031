"""Parses the command line and calls the command. Exit codes: 0 done, 1 failed, 2 misuse."""

from __future__ import annotations


def main() -> int:
    return 2
