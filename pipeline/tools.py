"""Tools: what a replica brings to every unit of one job. A value; does nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from typing import Any

from pipeline.answered import Indexes
from pipeline.earlier_parts import EarlierParts
from pipeline.engine.engine import Engine
from pipeline.feed import Feed
from pipeline.render import Renderer
from schemas.job import JobSpec
from schemas.record import JobRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """What a replica brings to every unit of one job."""

    record: JobRecord
    job: JobSpec
    engine: Engine
    feed: Feed
    """What the engine's ledger hears of its units."""
    renderer: Renderer
    worker: str
    provenance: dict[str, Any]
    indexes: Indexes = field(default_factory=Indexes)
    """Of what earlier outputs have answered."""
    earlier_parts: EarlierParts = field(default_factory=EarlierParts)
    """Where those answers are."""
