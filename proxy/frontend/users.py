"""The users that clients can be: their limits, their priority, and what each has asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from proxy.frontend.pacing import Pacing, UserLimits
from proxy.metrics import Family, MetricType, Sample
from proxy.settings import Settings, UserSettings
from proxy.settings.users import DEFAULT_USER
from routing.priority import Priority, parse_priority
from routing.token_bucket import bucket_of

if TYPE_CHECKING:
    from proxy.frontend.client import ClientConnection


class User:
    """One of them. It lives on after a reload that no longer has it, while connections are this user."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self.priority: Priority | None = None  # None: that of the listener
        self.limits: UserLimits | None = None  # None: it never had one
        self.commands_before = 0  # of connections that are this user no more
        self._settings = UserSettings(name)

    def adopt(self, settings: UserSettings, pacing: Pacing) -> None:
        """Go by these from now on. A bucket whose rate changes is full again."""
        before, self._settings = self._settings, settings
        self.priority = parse_priority(settings.priority) if settings.priority else None
        rate, burst = settings.requests_per_second, settings.requests_burst
        if (rate, burst, settings.in_flight_max) == (
            before.requests_per_second,
            before.requests_burst,
            before.in_flight_max,
        ):
            return
        bucket = bucket_of(rate, burst, pacing.clock()) if rate else None
        if self.limits is None:
            self.limits = UserLimits(pacing, bucket, settings.in_flight_max)
        else:
            self.limits.change(bucket, settings.in_flight_max)


class Users:
    """All of them, by name."""

    def __init__(self, pacing: Pacing) -> None:
        self._pacing = pacing
        self.default = User(DEFAULT_USER)
        self._of = {self.default.name: self.default}

    def adopt(self, settings: Settings) -> None:
        """These are the users from now on, and the default one."""
        known, self._of = self._of, {self.default.name: self.default}
        for each in settings.users:
            name = each.name.encode()
            user = self._of[name] = known.get(name) or User(each.name)
            user.adopt(each, self._pacing)

    def of(self, name: bytes) -> User:
        """The user of that name. One that a reload has removed is nobody in particular: the default user."""
        return self._of.get(name, self.default)

    def samples(self, clients: Iterable[ClientConnection]) -> Iterator[Sample]:
        """What each has sent and has in flight."""
        requests = {user: user.commands_before for user in self._of.values()}
        in_flight = dict.fromkeys(requests, 0)
        for client in clients:
            if client.owner in requests:
                requests[client.owner] += client.commands_as_user
                in_flight[client.owner] += len(client.slots)
        for user, number in requests.items():
            label = (user.name.decode(),)
            yield Sample(USER_REQUESTS, number, label)
            yield Sample(USER_IN_FLIGHT, in_flight[user], label)
        for limit, number in self._pacing.paced_total.items():
            yield Sample(PACED, number, (limit.value,))


USER_REQUESTS = Family(
    "steadyread_user_requests_total", "Commands that a user sent.", MetricType.COUNTER, ("user",)
)
USER_IN_FLIGHT = Family(
    "steadyread_user_in_flight_requests",
    "Commands of a user that are unanswered.",
    MetricType.GAUGE,
    ("user",),
)
PACED = Family(
    "steadyread_clients_paced_total",
    "Times that a client had to wait because it was over a limit, by which.",
    MetricType.COUNTER,
    ("limit",),
)
