"""A plan's report in, what the rest of the job takes out: reads the sample, runs the canary where one is asked for, compares the sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

from jobs.accept import Accepted
from jobs.api import PlanReport
from jobs.canary import Canary
from jobs.canary import run_canary
from jobs.estimate import Offer
from jobs.estimate import Tokens
from jobs.estimate import cheapest
from jobs.estimate import cut_remarks
from jobs.estimate import offer_here
from jobs.estimate import offers
from jobs.estimate import quickest
from jobs.estimate import tokens_of
from jobs.lengths import NO_ROWS
from jobs.lengths import SAMPLE_ROWS
from jobs.lengths import Lengths
from jobs.lengths import earlier_outputs
from jobs.lengths import mean_of
from jobs.lengths import share_of
from jobs.lengths import unknown_output
from jobs.reuse import context_of
from jobs.reuse import find_answered
from jobs.sample import look_at
from pipeline.engine.engine import Request
from pipeline.fit import MOST_NODES
from pipeline.hardware import find_profile
from pipeline.hardware import known_sizes
from pipeline.profile import cut_machine
from pipeline.shape import read_shape
from schemas.errors import JobError
from schemas.profile import Profile
from schemas.unit import WorkUnit

_CANARY_TIMEOUT_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is known of a job before it runs."""

    lengths: Lengths
    tokens: Tokens
    offers: tuple[Offer, ...]
    canary: Canary | None
    remarks: tuple[str, ...]
    """What the reader of the table should know."""

    def to_dict(self, *, deadline_s: float | None, max_usd: float | None) -> dict[str, Any]:
        """For --json."""
        best = {"cheapest": cheapest(self.offers, deadline_s), "quickest": quickest(self.offers, max_usd)}
        return {
            "lengths": {**asdict(self.lengths), "generated": asdict(self.lengths.generated)},
            "tokens": asdict(self.tokens),
            "offers": [asdict(offer) for offer in self.offers],
            "canary": asdict(self.canary) if self.canary else None,
            "remarks": list(self.remarks),
            **{name: asdict(offer) if offer else None for name, offer in best.items()},
        }


def forecast(
    report: PlanReport,
    *,
    canary_rows: int | None = None,
    history: Sequence[str] = (),
    nodes: Sequence[int],
    say: Callable[[str], None] = lambda _: None,
) -> Forecast:
    """Raises JobError where no row can be asked, EngineError where the canary's engine fails."""
    accepted = report.accepted
    job, model, units = accepted.job, accepted.model, units_left(accepted)
    rows = sum(unit.num_rows for unit in units)
    # Any beginning of a sample is a sample itself, so one reading serves the lengths and the canary.
    found = look_at(
        job,
        model,
        max(SAMPLE_ROWS, canary_rows or 0),
        max_model_len=context_of(accepted) or model.max_position_embeddings,
        seed_base=accepted.record.fingerprint,
        planned=(units, accepted.record.input_schema),
    )
    sampled = [row for row in found if row is not None]
    if not sampled:
        raise JobError("input: no row of a sample can be asked; `tokenmill run` would write each with its error")
    answered = find_answered(accepted, report.earlier, sampled, say)
    left = [request for (request, _), known in zip(sampled, answered, strict=True) if not known]
    taken = [request for (request, _), known in zip(sampled, answered, strict=True) if known]
    asked = (left or taken)[:SAMPLE_ROWS]
    # Where too few are left for a canary, rows that a run would take over make it up.
    canary = _canary(report, [*left, *taken][:canary_rows], say) if canary_rows else None
    if canary is not None:
        output, basis = mean_of(canary.output_lengths), "canary"
    elif history:
        most = max(request.sampling.max_tokens * request.sampling.n for request in asked)  # this job's, whatever the earlier one's was
        output, basis = mean_of([min(length, most) for folder in history for length in earlier_outputs(folder)]), "history"
    else:
        output, basis = unknown_output(mean_of([request.sampling.max_tokens * request.sampling.n for request in asked])), "max_tokens"
    lengths = Lengths(
        rows=rows,
        reused=share_of(len(taken), len(found)).times(rows) if report.earlier else NO_ROWS,
        unasked=share_of(len(found) - len(sampled), len(found)).times(rows) if len(found) > len(sampled) else NO_ROWS,
        sampled=min(len(sampled), SAMPLE_ROWS),
        prompt=mean_of([len(request.token_ids) for request in asked]),
        output=output,
        basis=basis,  # type: ignore[arg-type]
    )
    shape = read_shape(model.path)
    sizes = sizes_for(job.engine.profile)
    ways = offers(lengths, shape, sizes, nodes=nodes, options=job.engine.options, weight_bytes=model.weights_bytes)
    if canary is not None:
        # Of a job for a cluster the job's price is that of a node there.
        usd_here = accepted.usd_per_hour if accepted.cut is not None else None
        ways.insert(0, offer_here(lengths, canary, profile=report.profile, usd_per_hour=usd_here))
    return Forecast(
        lengths=lengths, tokens=tokens_of(lengths), offers=tuple(ways), canary=canary, remarks=tuple(_remarks(ways, len(sizes), nodes))
    )


def units_left(accepted: Accepted) -> list[WorkUnit]:
    """What a run would do: not the committed ones, nor those whose objects have changed, which it gives up."""
    changed = set(accepted.changed_objects)
    return [unit for unit in accepted.todo if changed.isdisjoint(part.uri for part in unit.ranges)]


def sizes_for(profile: str) -> list[Profile]:
    """Azure's, and the one that a job asks for where it is a node of the user's own; each by a name that no other has."""
    sizes = known_sizes()
    own = find_profile(profile) if profile != "auto" else None
    if own is None or own.node is None or own in sizes:
        return sizes
    taken = own.name in {size.name for size in sizes}
    return [*sizes, own.model_copy(update={"name": profile}) if taken else own]


def node_counts(text: str) -> tuple[int, ...]:
    """Of --nodes. Raises JobError."""
    try:
        counts = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        counts = ()
    if not counts or counts[0] < 1:
        raise JobError(f"--nodes: found {text!r}, expected whole numbers above 0 such as 1,4,16")
    return counts


def _canary(report: PlanReport, requests: Sequence[Request], say: Callable[[str], None]) -> Canary:
    job, model = report.accepted.job, report.accepted.model
    cut = report.accepted.cut or cut_machine(job.engine, model, replicas=job.cluster.replicas)
    say(f"canary: {len(requests)} rows on {cut.replicas} replica{'s' if cut.replicas > 1 else ''} here")
    began = time.monotonic()
    canary = run_canary(cut, model, job.engine.kind, requests, timeout_s=_CANARY_TIMEOUT_S)
    say(f"canary: done in {time.monotonic() - began:.0f} s, {canary.output_tokens_per_s:,.0f} output tok/s")
    return canary


def _remarks(found: Sequence[Offer], num_sizes: int, nodes: Sequence[int]) -> list[str]:
    sizes = {offer.profile for offer in found if not offer.here}
    remarks = ["Speeds by roofline are of vLLM, and of nobody's measurement here; prices are the profiles', dated there: set your own."]
    if len(sizes) < num_sizes:
        left = num_sizes - len(sizes)
        remarks.append(
            f"{left} of {num_sizes} sizes cannot hold this model on {MOST_NODES} nodes; `tokenmill model prepare` makes it smaller."
        )
    if max(nodes) > 1:
        remarks.append("Replicas are independent, on one node or several: their speeds add, and so does their start.")
    return [*remarks, *cut_remarks(found)]
