"""What must hold of the users beyond the limits of single options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from proxy.settings.fault import Fault
from proxy.settings.positions import Path
from proxy.settings.schema import dotted
from proxy.settings.values import UserSettings

DEFAULT_USER = "default"  # whom a client is that did not say

_NAME = re.compile(r"[!-~]{1,128}")  # as it stands in a line of CLIENT LIST


def user_faults(users: Sequence[UserSettings]) -> Iterator[Fault]:
    """All that is wrong with them, in the order of the options."""
    index_of_name: dict[str, int] = {}
    for index, user in enumerate(users):
        path: Path = ("users", index)
        if not _NAME.fullmatch(user.name):
            message = "give a name of 1 to 128 printable ASCII characters without spaces"
            yield Fault((*path, "name"), user.name, message)
        elif user.name == DEFAULT_USER:
            message = (
                "is who does not log in: its password is clients.password, the limits on each of its connections are "
                "in [clients], and it has none on all of them; give another name"
            )
            yield Fault((*path, "name"), user.name, message)
        elif (other := index_of_name.setdefault(user.name, index)) != index:
            taken: Path = ("users", other, "name")
            message = f"is taken by {dotted(taken)}; give another"
            yield Fault((*path, "name"), user.name, message, also=taken)
        if not user.password:
            message = "give a password here or in password_file: without one, everybody could be this user"
            yield Fault((*path, "password"), user.password, message, also=(*path, "password_file"))
