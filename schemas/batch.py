"""What a job file says of Azure Batch beyond names: whose hosts may see a token, which container a URI is in, when a schedule runs.

Pure checks; nothing is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from datetime import timedelta
from typing import Any
from typing import Self
from urllib.parse import urlsplit

from pydantic import AwareDatetime
from pydantic import field_validator
from pydantic import model_validator

from schemas.sampling import Frozen

RESOURCE_ID = r"^/subscriptions/[^/]+/resource[gG]roups/[^/]+/providers/Microsoft\.ManagedIdentity/userAssignedIdentities/[^/]+$"
CLIENT_ID = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"
POOL_ID = r"^[A-Za-z0-9_-]{1,64}$"
"""What Batch allows in any id."""
_CLOUDS = (".batch.azure.com", ".batch.chinacloudapi.cn", ".batch.usgovcloudapi.net")
_LOOPBACK = ("127.0.0.1", "localhost")
_BLOB = ("az", "abfs", "abfss")
_DURATION = re.compile(r"(\d+)([mhd])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_LEAST = timedelta(minutes=1)
"""Batch's own limit, for the interval and for the window."""


def check_endpoint(url: str) -> str:
    """The Batch account's URL, to which an identity's token will be sent. Raises ValueError."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    known = host.endswith(_CLOUDS) or host in _LOOPBACK  # a token that somebody else gets is theirs to use
    if parts.scheme != "https" or not known or parts.username or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"found {url!r}, expected https://ACCOUNT.REGION.batch.azure.com, as the account's page shows it")
    return url.rstrip("/")


def container_of(uri: str) -> str | None:
    """Account and container of an Azure URI, as far as it says them; None for any other place."""
    parts = urlsplit(uri)
    if "://" not in uri or parts.scheme not in _BLOB or not parts.netloc:
        return None
    container, _, host = parts.netloc.partition("@")
    return f"{host.split('.')[0]}/{container}"


def check_reachable(field: str, uri: str) -> None:
    """Nodes reach stores, not the submitter's disk. Raises ValueError."""
    if container_of(uri) is None:
        raise ValueError(f"{field} is {uri}: nodes of Azure Batch do not have this machine's files; use az:// or abfss://")


def check_keys_apart(keys: str, others: Iterable[str]) -> None:
    """Keys need a container of their own, since rights are given by container. Raises ValueError."""
    check_reachable("cluster.keys", keys)
    own = str(container_of(keys)).split("/")[1]
    for uri in others:
        other = container_of(uri)
        if other is not None and other.split("/")[1] == own:  # one name in two accounts is refused, too: nobody should have to look twice
            raise ValueError(
                f"cluster.keys is {keys}, in the container of {uri}: whoever may read that could run code on every node; "
                "give the keys a container of their own, which only the nodes' identity may read and write"
            )


def duration(text: str) -> timedelta:
    """`30m`, `6h`, `1d`. Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None or timedelta(**{_UNITS[match.group(2)]: int(match.group(1))}) < _LEAST:
        raise ValueError(f"found {text!r}, expected minutes, hours or days of at least one minute, as in 30m, 6h or 1d")
    return timedelta(**{_UNITS[match.group(2)]: int(match.group(1))})


class ScheduleSpec(Frozen):
    """When `tokenmill schedule` runs the job: a fixed interval, in UTC; Batch knows no calendar and no summer time."""

    every: str
    """From the start of one run to the next: 30m, 6h, 1d; at least 1m."""
    first: AwareDatetime | None = None
    """The first run, with a time zone, as in 2026-12-01T02:30:00Z; by default at once."""
    until: AwareDatetime | None = None
    """No run starts after this."""
    window: str | None = None
    """How late a run may start, while the one before it still runs; without it, it is left out when none can start by the next interval."""

    @field_validator("first", "until", mode="before")
    @classmethod
    def _moments(cls, value: Any) -> Any:
        """YAML reads a moment as one; in JSON, and on the command line, it is text."""
        if not isinstance(value, str):
            return value
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"found {value!r}, expected a moment with its time zone, as in 2026-12-01T02:30:00Z") from None

    @field_validator("every", "window")
    @classmethod
    def _durations(cls, text: str | None) -> str | None:
        if text is not None:
            duration(text)
        return text

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.first is not None and self.until is not None and self.until <= self.first:
            raise ValueError(f"until is {self.until:%Y-%m-%d %H:%M} UTC, not after first; nothing would ever run")
        if self.window is not None and duration(self.window) > duration(self.every):
            raise ValueError(f"window is {self.window}, longer than every ({self.every}); give at most the interval")
        return self
