"""Sections: evidence in, the document of a report out. Says what is known, what is not, and since when."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from datetime import UTC
from datetime import datetime

from jobs.progress import seconds_words
from jobs.report import per_second
from jobs.report import share_of_raw
from jobs.report import statistics_of
from jobs.reporting import figures
from jobs.reporting import plots
from jobs.reporting.document import Document
from jobs.reporting.document import Plot
from jobs.reporting.document import Section
from jobs.reporting.document import Table
from jobs.reporting.document import Tile
from jobs.reporting.document import Tone
from jobs.reporting.evidence import Counts
from jobs.reporting.evidence import Evidence
from jobs.reporting.origin import provenance
from jobs.spread import STATISTICS
from schemas.ledger import KINDS
from schemas.ledger import ReplicaAccount

MAX_BARS = 24
MAX_ROWS = 60
"""Of a table with a row for each replica or node; `tokenmill report --json` has them all."""
_KIND_WORDS: dict[str, str] = {kind: kind.replace("_", "-") for kind in KINDS}
_GOES_ON = ("starting", "running", "draining")
_TONES: Mapping[str, Tone] = {"complete": "good", "failed": "bad", "interrupted": "bad"}


def document(evidence: Evidence) -> Document:
    """The whole report."""
    status = evidence.status
    state = status.state
    return Document(
        name=status.name,
        state=state,
        tone=_TONES.get(state, "plain"),
        so_far="" if state == "complete" else so_far(evidence),
        lead=f"{status.rows:,} rows in {status.units:,} units, to {status.out_uri}",
        made=f"{moment(evidence.read_at)}, job {status.fingerprint[:8]}, Tokenmill {evidence.record.tool_version}",
        tiles=tiles(evidence),
        sections=tuple(
            section
            for section in (
                summary(evidence),
                throughput(evidence),
                ledger(evidence),
                balance(evidence),
                lengths(evidence),
                outcomes(evidence),
                repeated(evidence),
                cost(evidence),
                provenance(evidence),
            )
            if section is not None
        ),
    )


def so_far(evidence: Evidence) -> str:
    """What an unfinished job lacks, and how old what is known of it is."""
    status = evidence.status
    words = f"So far: {status.rows_done:,} of {status.rows:,} rows ({status.rows_done / max(1, status.rows):.1%}) are committed."
    if status.state in _GOES_ON:
        words += " The job goes on; everything below counts committed units, and engine seconds up to its driver's last word"
        words += f" {seconds_words(status.age_s)} before this was made." if status.age_s is not None else "."
    elif status.rows_done == status.rows:
        words += " No run has closed the job yet; run the same command again."
    else:
        words += " No run is at work; the same command again goes on from here."
    return words


def tiles(evidence: Evidence) -> tuple[Tile, ...]:
    """The figures that everybody asks for."""
    account, status = evidence.account, evidence.status
    rows, error_rows = sum(unit.rows for unit in evidence.units), sum(unit.error_rows for unit in evidence.units)
    spent = figures.cost(account.runs, evidence.usd_per_hour)
    once_up = share_of_raw(*account.runs, once_up=True)
    per_million = (
        "" if spent is None or not account.output_tokens else f"{spent.usd / account.output_tokens * 1e6:,.3f} USD/M output tokens"
    )
    return (
        Tile(label="rows", value=f"{rows:,}", note="all of them" if status.state == "complete" else f"of {status.rows:,}"),
        Tile(label="output tokens/s", value=number(account.output_tokens_per_s), note=f"{number(account.total_tokens_per_s)} with prompts"),
        Tile(label="of the raw engine", value=percent(account.share_of_raw_engine), note=f"{percent(once_up)} without the starts"),
        Tile(label="wall time", value=seconds_words(account.elapsed_s), note=f"{len(account.runs)} run{'s' * (len(account.runs) != 1)}"),
        Tile(label="error rows", value=f"{error_rows:,}", note=percent(error_rows / max(1, rows)), tone="bad" if error_rows else "plain"),
        Tile(label="cost", value="not known" if spent is None else f"{spent.usd:,.2f} USD", note=per_million),
    )


def summary(evidence: Evidence) -> Section:
    account, units = evidence.account, evidence.units
    prompt_tokens, output_tokens = sum(unit.prompt_tokens for unit in units), sum(unit.completion_tokens for unit in units)
    against = (
        "the rate given" if account.raw_tokens_per_s is not None else "what the replicas generate with their batches half full or fuller"
    )
    failed = evidence.status.said.get("failed_units", {}) if evidence.status.state != "complete" else {}
    runs = Table(
        title="Runs",
        columns=("run", "state", "began", "wall", "units", "rows", "retries", "output tokens", "tokens/s", "of raw"),
        num_words=3,
        rows=tuple(
            (
                run.run,
                run.state + ("" if run.whole else " (last word)"),
                moment(run.began_at),
                seconds_words(run.elapsed_s),
                f"{run.units:,}",
                f"{run.rows:,}",
                f"{run.retries:,}",
                f"{run.output_tokens:,}",
                number(per_second(run.output_tokens, run.elapsed_s)),
                percent(share_of_raw(run)),
            )
            for run in account.runs
        ),
    )
    given_up = Table(
        title="Units given up", columns=("unit", "why"), num_words=2, rows=tuple((unit, str(why)) for unit, why in failed.items())
    )
    return Section(
        title="Summary",
        words=(*account.unknown, *account.left_out),
        facts=(
            ("state", evidence.status.state),
            ("rows", f"{evidence.status.rows_done:,} of {evidence.status.rows:,} in {len(units):,} of {evidence.status.units:,} units"),
            ("tokens of committed rows", f"{prompt_tokens:,} prompt, {output_tokens:,} output"),
            ("output", f"{evidence.size_bytes / 1e6:,.1f} MB in {len(units):,} parts"),
            ("speed", f"{number(account.output_tokens_per_s)} output tokens/s, {number(account.total_tokens_per_s)} with prompts"),
            ("share of the raw engine", f"{percent(account.share_of_raw_engine)} of {against}, from each run's command to its end"),
        ),
        tables=(runs, *([given_up] if failed else [])),
    )


def throughput(evidence: Evidence) -> Section | None:
    found = figures.throughput(evidence.units, evidence.account.runs)
    done, goal = float(found.rows[-1]), evidence.status.rows
    if not done:
        return None
    growth = Plot(
        title="Rows committed",
        says=f"{done:,.0f} of {goal:,} rows, the dotted line, by units.",
        svg=plots.growth(found.edges_s, found.rows, goal, found.run_begins_s, unit="rows"),
    )
    return Section(title="Throughput over time", plots=(*([_rate(evidence, found)] if found.tokens_per_s.any() else []), growth))


def _rate(evidence: Evidence, found: figures.Throughput) -> Plot:
    peak, width_s = float(found.tokens_per_s.max()), float(found.edges_s[1] - found.edges_s[0])
    says = (
        f"At most {number(peak)} output tokens/s, {number(float(found.tokens_per_s.mean()))} in the mean, in steps of {width_s:.2g} s. "
        "Each committed unit's tokens are spread evenly from its first read to its commit."
    )
    counts = {
        "copied from identical rows": sum(unit.copied_tokens for unit in evidence.units),
        "saved by earlier attempts": sum(unit.resumed_tokens for unit in evidence.units),
    }
    among = " and ".join(f"{count:,} that were {how}" for how, count in counts.items() if count)
    says += f" Among them are {among}." if among else ""
    reused = sum(unit.reused_tokens for unit in evidence.units)
    says += f" The {reused:,} tokens of rows reused from earlier outputs are not in it." if reused else ""
    if found.run_begins_s:
        says += " Pauses between runs are left out; dashed lines are where runs begin."
    svg = plots.rate(found.edges_s, found.tokens_per_s, found.run_begins_s, unit="tokens/s")
    return Plot(title="Output tokens/s", says=says, svg=svg)


def ledger(evidence: Evidence) -> Section:
    """Every second of every replica by kind."""
    replicas = evidence.account.replicas
    total_s = sum(replica.lifetime_s for replica in replicas)
    shown = figures.ends_of(replicas, MAX_BARS)
    of_kind = {kind: sum(replica.seconds.get(kind, 0.0) for replica in replicas) for kind in KINDS}
    says = ", ".join(f"{_KIND_WORDS[kind]} {percent(seconds / total_s if total_s else 0.0)}" for kind, seconds in of_kind.items())
    if len(shown) < len(replicas):
        says += f". Of {len(replicas):,} replicas the {len(shown) // 2} least and the {len(shown) - len(shown) // 2} most busy are drawn"
    svg = plots.stacked({replica.name: dict(replica.seconds) for replica in shown})
    legend = tuple((kind, _KIND_WORDS[kind]) for kind in KINDS)
    return Section(
        title="Engine seconds",
        words=(
            "Every second of every replica is of one kind. start: until its engine is up. busy: its batch at least half full. starved: "
            "under half full, or empty, and more rows came later. commit-blocked: the same while its units wrote and none read. tail: "
            "likewise when no more rows came. lost: for what was thrown away or made again, and what dead processes took with them.",
        ),
        plots=(Plot(title="Seconds by kind", says=says + ".", svg=svg, legend=legend),) if replicas else (),
        tables=(_spread_table(replicas), _ledger_table(replicas)) if replicas else (),
    )


def _spread_table(replicas: Sequence[ReplicaAccount]) -> Table:
    """The statistics of every column of the ledger, a row each."""
    columns = statistics_of(replicas)
    words: dict[str, str] = {"lifetime_s": "seconds", **_KIND_WORDS, "output_tokens": "output tokens", "output_tokens_per_s": "tokens/s"}
    return Table(
        title="Over replicas",
        columns=("", *STATISTICS),
        rows=tuple((word, *(number(columns[key][name]) for name in STATISTICS)) for key, word in words.items()),
    )


def _ledger_table(replicas: Sequence[ReplicaAccount]) -> Table:
    return Table(
        title="Each replica",
        columns=("replica", "seconds", *_KIND_WORDS.values(), "output tokens", "tokens/s"),
        rows=tuple(
            (
                replica.name,
                *(f"{seconds:,.1f}" for seconds in (replica.lifetime_s, *(replica.seconds.get(kind, 0.0) for kind in KINDS))),
                f"{replica.output_tokens:,}",
                number(per_second(replica.output_tokens, replica.lifetime_s)),
            )
            for replica in replicas[:MAX_ROWS]
        ),
        folded=len(replicas) > MAX_BARS,
        note=_cut_note(len(replicas), "replicas"),
    )


def balance(evidence: Evidence) -> Section | None:
    """Between nodes; between replicas where there is one node."""
    replicas = evidence.account.replicas
    by_node = len(figures.balance(evidence.units, replicas, by_node=True)) > 1
    shares = figures.balance(evidence.units, replicas, by_node=by_node)
    if len(shares) < 2:
        return None
    tokens = [share.output_tokens for share in shares]
    mean, what = sum(tokens) / len(tokens), "node" if by_node else "replica"
    spread = (
        f"Of the mean {what}'s output tokens, the least has {percent(min(tokens) / mean)} and the most {percent(max(tokens) / mean)}."
        if mean
        else ""
    )
    ranked = sorted(shares, key=lambda share: share.output_tokens)
    drawn = shares if len(shares) <= MAX_BARS else [*ranked[: MAX_BARS // 2], *ranked[-MAX_BARS // 2 :]]
    if len(drawn) < len(shares):
        spread += f" Drawn are the {MAX_BARS // 2} with the fewest and the {MAX_BARS // 2} with the most of {len(shares):,}."
    svg = plots.bars({share.name: float(share.output_tokens) for share in drawn}, unit="output tokens", mean=True)
    table = Table(
        title=f"Each {what}",
        columns=(what, "replicas", "units", "rows", "tokens", "of mean", "busy"),
        rows=tuple(
            (
                share.name,
                f"{share.replicas:,}",
                f"{share.units:,}",
                f"{share.rows:,}",
                f"{share.output_tokens:,}",
                percent(share.output_tokens / mean if mean else None),
                percent(share.busy_s / share.lifetime_s if share.lifetime_s else None),
            )
            for share in shares[:MAX_ROWS]
        ),
        folded=len(shares) > MAX_BARS,
        note=_cut_note(len(shares), f"{what}s"),
    )
    return Section(title=f"Balance between {what}s", plots=(Plot(title=f"Output tokens by {what}", says=spread, svg=svg),), tables=(table,))


def lengths(evidence: Evidence) -> Section | None:
    found = evidence.lengths
    if not found.completion.size:
        return None
    sampled = (
        f"A sample: the {found.completion.size:,} rows with a completion in {found.num_parts:,} of {found.of_parts:,} parts, "
        "evenly over the table."
        if found.num_parts < found.of_parts
        else f"Of all {found.completion.size:,} committed rows that have a completion."
    )
    return Section(
        title="Lengths",
        words=(sampled,),
        plots=(_histogram("Prompt", found.prompt), _histogram("Completion", found.completion)),
    )


def _histogram(what: str, tokens: Counts) -> Plot:
    bins = figures.histogram(tokens)
    ranked = sorted(tokens.tolist())
    median, ninety_nine = ranked[len(ranked) // 2], ranked[min(len(ranked) - 1, len(ranked) * 99 // 100)]
    mean = sum(ranked) / len(ranked)
    says = f"{ranked[0]:,} to {ranked[-1]:,} tokens, median {median:,}, mean {mean:,.1f}, 99th percentile {ninety_nine:,}."
    svg = plots.histogram(bins.edges.tolist(), bins.rows.tolist(), unit=f"{what.lower()} tokens")
    return Plot(title=f"{what} lengths", says=says, svg=svg)


def outcomes(evidence: Evidence) -> Section:
    """Finish reasons and errors."""
    reasons = figures.counted(unit.finish_reasons for unit in evidence.units)
    errors = figures.counted(unit.errors for unit in evidence.units)
    flaws = figures.counted(unit.flaws for unit in evidence.units)
    rows = max(1, sum(unit.rows for unit in evidence.units))
    examples = figures.error_examples(evidence.units)
    finish = Table(
        title="Finish reasons",
        columns=("reason", "rows", "share"),
        rows=tuple((reason, f"{count:,}", percent(count / rows)) for reason, count in reasons.items()),
    )
    failed = Table(
        title="Error rows by kind",
        columns=("kind", "rows", "share"),
        rows=tuple((kind, f"{count:,}", percent(count / rows)) for kind, count in errors.items()),
    )
    shown = Table(
        title="Examples",
        columns=("kind", "row", "message"),
        num_words=3,
        rows=tuple((kind, str(example["row"]), str(example["message"])) for kind in errors for example in examples.get(kind, [])),
    )
    flagged = Table(
        title="Completions that may be of no use",
        columns=("flaw", "rows", "share", "the first in the table"),
        rows=tuple(
            (flaw, f"{count:,}", percent(count / rows), ", ".join(map(str, figures.first_flagged(evidence.units, flaw))))
            for flaw, count in flaws.items()
        ),
    )
    return Section(
        title="How rows ended",
        words=() if errors else ("No row ended in an error.",),
        tables=(finish, *([failed, shown] if errors else []), *([flagged] if flaws else [])),
    )


def repeated(evidence: Evidence) -> Section:
    goes_on = evidence.status.state in _GOES_ON
    found = figures.repeated(evidence.units, evidence.account.runs, goes_on=goes_on)
    return Section(
        title="Repeated work",
        facts=(
            ("rows taken over from earlier attempts", f"{found.resumed_rows:,} ({found.resumed_tokens:,} output tokens)"),
            ("rows copied from identical ones", f"{found.copied_rows:,} ({found.copied_tokens:,} output tokens)"),
            ("prompt tokens found in the prefix cache", f"{found.cached_prompt_tokens:,}"),
            ("rows reused from earlier outputs", f"{found.reused_rows:,} ({found.reused_tokens:,} output tokens)"),
            ("units tried again", f"{found.retries:,}"),
            ("units run a second time because they held up the end", f"{found.doubled:,}"),
            ("engine processes started again", f"{found.processes:,}"),
            (
                "tokens generated and not kept",
                f"{found.wasted_tokens:,}" + (" (by runs that are over)" if goes_on else ""),
            ),
        ),
    )


def cost(evidence: Evidence) -> Section:
    account = evidence.account
    spent = figures.cost(account.runs, evidence.usd_per_hour)
    if spent is None:
        profiles = sorted({run.profile for run in account.runs if evidence.usd_per_hour[run.run] is None})
        why = (
            f"Not known: nobody has said what a node of profile {', '.join(profiles)} costs. `tokenmill report --usd-per-hour` says it for "
            "this page, limits.usd_per_hour in the job file for runs from then on."
        )
        return Section(title="Cost", words=(why,))
    each = sorted({price for price in evidence.usd_per_hour.values() if price is not None})
    return Section(
        title="Cost",
        words=("Nodes count from each run's command to its end, whether or not their engines are up. Pools that idle are not in it.",),
        facts=(
            ("cost", f"{spent.usd:,.2f} USD"),
            ("node hours", f"{spent.node_hours:,.2f}"),
            ("price", " and ".join(f"{price:,.2f} USD per node and hour" for price in each)),
            (
                "per million output tokens",
                f"{spent.usd / account.output_tokens * 1e6:,.3f} USD" if account.output_tokens else "no token yet",
            ),
            ("per thousand rows", f"{spent.usd / account.num_requests * 1e3:,.3f} USD" if account.num_requests else "no row yet"),
        ),
    )


def _cut_note(count: int, what: str) -> str:
    return "" if count <= MAX_ROWS else f"The first {MAX_ROWS} of {count:,} {what}; `tokenmill report --json` has all of them."


def moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def percent(share: float | None) -> str:
    return "not known" if share is None else f"{share:.1%}"
