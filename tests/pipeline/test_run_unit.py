"""One unit from Parquet to committed part: on the simulated engine, and on small engines that shuffle, fail and lie."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.engine.engine import EngineCounters
from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import GeneratedChoice
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.feed import Feed
from pipeline.flight import Flight
from pipeline.flight import Tag
from pipeline.model import resolve_model
from pipeline.read import identity_of
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from pipeline.replica import Replica
from pipeline.segments import folder_of
from pipeline.segments import record_death
from pipeline.tools import Tools
from pipeline.unit import run_unit
from pipeline.unit_pass import resumed
from schemas import layout
from schemas.errors import EngineDead
from schemas.errors import EngineEvicted
from schemas.errors import ForeignOutput
from schemas.errors import InputChanged
from schemas.errors import ReplicaLost
from schemas.errors import UnitError
from schemas.job import JobSpec
from schemas.manifest import UnitReport
from schemas.prompts import RowError
from schemas.record import JobRecord
from schemas.record import encode_schema
from schemas.sampling import Sampling
from schemas.unit import RowRange
from schemas.unit import WorkUnit

INFO = EngineInfo(kind="small", version="1", dtype="none", max_model_len=512, max_num_seqs=64)
HI = [109, 110]  # any two tokens


class SmallEngine:
    """Takes everything in, then answers in the order that `answers` gives."""

    def __init__(self, answers: Callable[[list[Request]], Iterable[Generation]]) -> None:
        self._answers = answers
        self.asked: list[Request] = []
        self.calls: list[tuple[list[int], bool]] = []

    @property
    def info(self) -> EngineInfo:
        return INFO

    def generate(
        self, requests: Iterable[Request], *, tag: Tag | None = None, alone: bool = False, wide: bool = False
    ) -> Iterator[Generation]:
        taken = list(requests)
        self.asked += taken
        self.calls.append((sorted(request.position for request in taken), alone))
        yield from self._answers(taken)

    def counters(self) -> EngineCounters:
        return EngineCounters(rows=0, prompt_tokens=0, completion_tokens=0, in_flight=0)

    def close(self) -> None:
        return


def answer(request: Request, **choice: Any) -> Generation:
    """The prompt's own tokens, so that an answer shows whose it is."""
    values: dict[str, Any] = {"token_ids": list(request.token_ids), "finish_reason": "stop", **choice}
    return Generation(position=request.position, choices=(GeneratedChoice(**values),))


def shuffled(requests: list[Request]) -> list[Generation]:
    answers = [answer(request) for request in requests]
    random.Random(3).shuffle(answers)
    return answers


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output's folder."""
    return tmp_path / "out"


@pytest.fixture
def job(make_job: Callable[..., JobSpec]) -> JobSpec:
    """Plain text of column prompt, cut into tokens one by one."""
    return make_job(input={"chat": False})


def unit_over(*paths: Path, rows: int, index: int = 0, position: int = 0) -> WorkUnit:
    """The first `rows` rows of each file."""
    ranges = []
    for path in paths:
        ranges.append(RowRange(uri=str(path), identity=identity_of(str(path)), row_start=0, row_stop=rows, position=position))
        position += rows
    return WorkUnit(index=index, ranges=tuple(ranges))


def record_of(job: JobSpec, schema: pa.Schema) -> JobRecord:
    model = resolve_model(job.model)
    decides = {
        **dict.fromkeys(("plan", "sampling", "prompt"), "x"),
        "weights": model.weights_digest,
        "tokenizer": model.tokenizer_digest,
        "chat_template": model.template_digest,
        "engine": {"kind": "simulated"},
    }
    data = job.model_dump(by_alias=True, exclude_unset=True, mode="json")
    return JobRecord(job=data, decides=decides, schema=encode_schema(schema), tool_version="1")


def tools_for(job: JobSpec, schema: pa.Schema, engine: SmallEngine) -> Tools:
    record = record_of(job, schema)
    renderer = Renderer(load_tokenizer(job.model), job, max_model_len=INFO.max_model_len, seed_base=record.fingerprint)
    return Tools(record=record, job=job, engine=engine, feed=Feed(), renderer=renderer, worker="w", provenance={"tool": "t"})


def prompts(count: int) -> pa.Table:
    return pa.table({"id": pa.array(range(count), pa.int64()), "prompt": [f"prompt number {index}" for index in range(count)]})


def parts(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*") if path.name != layout.FOLDER) if out.exists() else []


def committed(out: Path) -> pa.Table:
    (name,) = parts(out)
    return pq.read_table(out / name)


WriteTable = Callable[..., Path]


def test_rows_come_out_in_input_order_whatever_order_the_engine_answers_in(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = prompts(300)
    unit = unit_over(write_table(table), rows=300, index=7, position=1000)
    report, outcome = run_unit(unit, str(out), tools_for(job, table.schema, SmallEngine(shuffled)))
    made = committed(out)
    assert outcome == "created"
    assert made.select(["id", "prompt"]).equals(table)
    assert made.column("completion").to_pylist() == table.column("prompt").to_pylist()
    assert made.column("prompt_tokens").to_pylist() == [len(text) + 1 for text in table.column("prompt").to_pylist()]
    assert set(made.column("error").to_pylist()) == {None}
    assert (report.unit, report.rows, report.error_rows, report.finish_reasons) == (7, 300, 0, {"stop": 300})
    assert report.prompt_tokens == report.completion_tokens == sum(len(text) + 1 for text in table.column("prompt").to_pylist())


def test_the_report_lies_in_the_parts_footer(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = prompts(5)
    report, _ = run_unit(unit_over(write_table(table), rows=5), str(out), tools_for(job, table.schema, SmallEngine(shuffled)))
    (name,) = parts(out)
    assert name == f"part-00000000-{report.fingerprint[:8]}.parquet"
    assert UnitReport.from_json(pq.read_metadata(out / name).metadata[b"tokenmill.report"]) == report


def test_a_unit_over_several_files_comes_out_as_one_part_in_order(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = prompts(6)
    paths = [write_table(table.slice(2 * index, 2), f"in/{index}.parquet") for index in range(3)]
    run_unit(unit_over(*paths, rows=2), str(out), tools_for(job, table.schema, SmallEngine(shuffled)))
    assert committed(out).column("id").to_pylist() == list(range(6))


def test_a_unit_without_rows_commits_a_part_that_carries_the_schema(job: JobSpec, out: Path) -> None:
    schema = prompts(0).schema
    report, outcome = run_unit(WorkUnit(index=0, ranges=()), str(out), tools_for(job, schema, SmallEngine(shuffled)))
    assert (report.rows, outcome, committed(out).num_rows) == (0, "created", 0)
    assert committed(out).column_names[:3] == ["id", "prompt", "completion"]


def test_a_unit_that_is_done_is_not_done_again(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = prompts(5)
    unit, engine = unit_over(write_table(table), rows=5), SmallEngine(shuffled)
    first, _ = run_unit(unit, str(out), tools_for(job, table.schema, engine))
    assert run_unit(unit, str(out), tools_for(job, table.schema, engine)) == (first, "already")
    assert len(engine.asked) == 5


def test_all_rows_bad_never_reach_the_engine_and_come_out_as_errors(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = pa.table({"prompt": pa.array([None] * 300, pa.string())})
    engine = SmallEngine(shuffled)
    report, outcome = run_unit(unit_over(write_table(table), rows=300, position=50), str(out), tools_for(job, table.schema, engine))
    made = committed(out)
    assert (engine.asked, outcome, made.num_rows) == ([], "created", 300)
    assert set(made.column("finish_reason").to_pylist()) == {"error"}
    assert made.column("completion").null_count == 300
    assert (report.error_rows, report.errors, report.prompt_tokens) == (300, {"empty_prompt": 300}, 0)
    assert report.examples == [{"row": 50, "kind": "empty_prompt", "message": "column 'prompt' is null"}]


def test_bad_rows_stand_between_good_ones(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    texts = [None if index % 3 == 0 else "x" * 600 if index % 3 == 1 else f"row {index}" for index in range(200)]
    table = pa.table({"prompt": pa.array(texts, pa.string())})
    report, _ = run_unit(unit_over(write_table(table), rows=200), str(out), tools_for(job, table.schema, SmallEngine(shuffled)))
    rows = committed(out).to_pylist()
    assert [row["completion"] for row in rows] == [None if index % 3 < 2 else f"row {index}" for index in range(200)]
    assert [row["error"]["kind"] if row["error"] else None for row in rows] == [
        ("empty_prompt", "prompt_too_long", None)[index % 3] for index in range(200)
    ]
    assert report.errors == {"empty_prompt": 67, "prompt_too_long": 67}
    assert [example["row"] for example in report.examples] == [0, 1]
    assert rows[1]["prompt_tokens"] == 601


def test_an_error_of_the_engine_is_an_error_row(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    def refuse_the_second(requests: list[Request]) -> list[Generation]:
        made = [answer(request) for request in requests]
        made[1] = Generation(position=made[1].position, error=RowError(kind="refused", message="no such token"))
        return made

    table = prompts(3)
    report, _ = run_unit(unit_over(write_table(table), rows=3), str(out), tools_for(job, table.schema, SmallEngine(refuse_the_second)))
    rows = committed(out).to_pylist()
    assert [row["completion"] for row in rows] == ["prompt number 0", None, "prompt number 2"]
    assert rows[1]["error"] == {"kind": "refused", "message": "no such token"}
    assert (rows[1]["finish_reason"], rows[1]["prompt_tokens"], rows[1]["completion_tokens"]) == ("error", 16, 0)
    assert report.errors == {"refused": 1}


def test_the_engines_own_text_is_taken_where_it_saw_stop_strings(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    def some_with_text(requests: list[Request]) -> list[Generation]:
        return [answer(request, text="cut" if request.position == 1 else None) for request in requests]

    table = prompts(3)
    run_unit(unit_over(write_table(table), rows=3), str(out), tools_for(job, table.schema, SmallEngine(some_with_text)))
    assert committed(out).column("completion").to_pylist() == ["prompt number 0", "cut", "prompt number 2"]


def test_an_empty_text_of_the_engine_is_a_text(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = prompts(1)
    engine = SmallEngine(lambda requests: [answer(requests[0], text="")])
    run_unit(unit_over(write_table(table), rows=1), str(out), tools_for(job, table.schema, engine))
    assert committed(out).column("completion").to_pylist() == [""]


def test_rows_choose_for_themselves_whether_special_tokens_are_shown(
    write_table: WriteTable, make_job: Callable[..., JobSpec], out: Path
) -> None:
    job = make_job(input={"chat": False, "sampling": "s"})
    table = pa.table({"prompt": ["a", "b"], "s": ['{"skip_special_tokens": false}', None]})
    run_unit(unit_over(write_table(table), rows=2), str(out), tools_for(job, table.schema, SmallEngine(shuffled)))
    assert committed(out).column("completion").to_pylist() == ["<s>a", "b"]


def twice(requests: list[Request]) -> list[Generation]:
    return [answer(requests[0]), *[answer(request) for request in requests]]


def twice_late(requests: list[Request]) -> list[Generation]:
    return [*[answer(request) for request in requests], answer(requests[0])]


def never(requests: list[Request]) -> list[Generation]:
    return [answer(request) for request in requests[:-1]]


def not_at_all(requests: list[Request]) -> list[Generation]:
    return []


def unknown(requests: list[Request]) -> list[Generation]:
    return [*[answer(request) for request in requests[:-1]], replace(answer(requests[-1]), position=10_000)]


def one_of_the_bad(requests: list[Request]) -> list[Generation]:
    return [replace(answer(requests[0]), position=2)]


@pytest.mark.parametrize("answers", [twice, twice_late, never, not_at_all, unknown, one_of_the_bad])
def test_an_engine_that_miscounts_is_an_error_of_the_unit_and_nothing_is_committed(
    write_table: WriteTable, job: JobSpec, out: Path, answers: Callable[[list[Request]], list[Generation]]
) -> None:
    table = pa.table({"prompt": pa.array(["a", "b", None, "d"] * 50, pa.string())})
    with pytest.raises(UnitError):
        run_unit(unit_over(write_table(table), rows=200), str(out), tools_for(job, table.schema, SmallEngine(answers)))
    assert parts(out) == []


def test_an_engine_that_dies_leaves_nothing_behind(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    def die(requests: list[Request]) -> Iterator[Generation]:
        yield answer(requests[0])
        raise EngineDead("gone")

    table = prompts(3)
    with pytest.raises(EngineDead):
        run_unit(unit_over(write_table(table), rows=3), str(out), tools_for(job, table.schema, SmallEngine(die)))
    assert parts(out) == []


def test_an_input_that_changes_while_it_is_worked_on_is_not_committed(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    def change_the_input(requests: list[Request]) -> list[Generation]:
        write_table(prompts(4))
        return shuffled(requests)

    table = prompts(3)
    path = write_table(table)
    with pytest.raises(InputChanged, match=str(path)):
        run_unit(unit_over(path, rows=3), str(out), tools_for(job, table.schema, SmallEngine(change_the_input)))
    assert parts(out) == []


def test_an_input_that_changed_before_is_not_generated(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table, engine = prompts(3), SmallEngine(shuffled)
    unit = unit_over(write_table(table), rows=3)
    write_table(prompts(4))
    with pytest.raises(InputChanged):
        run_unit(unit, str(out), tools_for(job, table.schema, engine))
    assert (engine.asked, parts(out)) == ([], [])


def test_something_else_under_the_parts_name_stops_the_job_and_stays(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = prompts(3)
    unit, tools = unit_over(write_table(table), rows=3), tools_for(job, table.schema, SmallEngine(shuffled))
    target = out / unit.part_name(tools.record.fingerprint)
    storage.create_once(str(target), b"not a part")
    with pytest.raises(ForeignOutput):
        run_unit(unit, str(out), tools)
    assert target.read_bytes() == b"not a part"


def test_a_race_that_is_lost_while_generating_counts_the_winners_part(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = prompts(3)
    unit = unit_over(write_table(table), rows=3)

    def somebody_else_is_quicker(requests: list[Request]) -> list[Generation]:
        run_unit(unit, str(out), tools_for(job, table.schema, SmallEngine(shuffled)))
        return shuffled(requests)

    _, outcome = run_unit(unit, str(out), tools_for(job, table.schema, SmallEngine(somebody_else_is_quicker)))
    assert outcome == "race_lost"
    assert committed(out).column("id").to_pylist() == [0, 1, 2]


def test_columns_of_every_kind_pass_unchanged(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", None, "c"],
            "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
            "decimal": pa.array([1, None, 3], pa.decimal128(12, 3)),
            "when": pa.array([1, 2, None], pa.timestamp("us", tz="Asia/Tokyo")),
            "large": pa.array(["x", None, ""], pa.large_string()),
            "nested": pa.array([[{"a": [1, 2]}], [], None], pa.list_(pa.struct([("a", pa.list_(pa.int16()))]))),
            "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
            "fixed": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2)),
            "nothing": pa.nulls(3),
        },
        metadata={"pandas": '{"columns": []}', "owner": "somebody"},
    )
    path = write_table(table, row_group_size=2)
    schema = pq.read_schema(path)
    run_unit(unit_over(path, rows=3), str(out), tools_for(job, schema, SmallEngine(shuffled)))
    made = committed(out)
    assert made.select(table.column_names).replace_schema_metadata().equals(table.replace_schema_metadata())
    assert {key: (made.schema.metadata or {})[key] for key in table.schema.metadata or {}} == table.schema.metadata


@pytest.fixture
def replica(tiny_model: Path) -> Iterator[Replica]:
    """One simulated engine on the tiny model."""
    made = Replica(
        name="w0",
        model=resolve_model(str(tiny_model)),
        kind="simulated",
        options={"decode_tokens_per_s": 1e7, "prefill_tokens_per_s": 1e8, "max_num_seqs": 8},
    )
    yield made
    made.close()


def run_on(replica: Replica, job: JobSpec, schema: pa.Schema, unit: WorkUnit) -> dict[str, Any]:
    """What the driver does: leave the record in the output, then ask for the unit."""
    record = record_of(job, schema)
    with contextlib.suppress(FileExistsError):
        storage.create_once(storage.join(job.output.uri, layout.JOB), record.to_json())
    return replica.run(job.output.uri, record.fingerprint, unit.to_dict())


def test_a_replica_runs_a_unit_from_plain_data_to_plain_data(
    write_table: WriteTable, make_job: Callable[..., JobSpec], replica: Replica, out: Path
) -> None:
    table = prompts(200)
    result = run_on(replica, make_job(output={"token_ids": True}), table.schema, unit_over(write_table(table), rows=200))
    made = pq.read_table(next(out.glob("part-*.parquet")))
    assert result["outcome"] == "created"
    assert (result["report"]["rows"], result["report"]["worker"], result["report"]["error_rows"]) == (200, "w0", 0)
    assert made.column("id").to_pylist() == list(range(200))
    assert [len(ids) for ids in made.column("token_ids").to_pylist()] == made.column("completion_tokens").to_pylist()
    assert sum(made.column("completion_tokens").to_pylist()) == result["report"]["completion_tokens"]
    assert set(result["report"]["finish_reasons"]) == {"stop", "length"}
    assert replica.status()["rows"] == 200
    assert (replica.status()["in_flight"], replica.status()["window_rows"]) == (0, 16)


def test_the_same_unit_on_another_replica_gives_the_same_rows(
    write_table: WriteTable, make_job: Callable[..., JobSpec], replica: Replica, tiny_model: Path, tmp_path: Path
) -> None:
    table = prompts(50)
    unit = unit_over(write_table(table), rows=50)
    other = Replica(
        name="w1", model=resolve_model(str(tiny_model)), kind="simulated", options={"max_num_seqs": 3, "decode_tokens_per_s": 1e7}
    )
    made = []
    for worker, name in ((replica, "a"), (other, "b")):
        job = make_job(output={"uri": str(tmp_path / name), "token_ids": True}, sampling={"temperature": 1.0, "n": 2})
        run_on(worker, job, table.schema, unit)
        made.append(pq.read_table(next((tmp_path / name).glob("part-*.parquet"))))
    other.close()
    assert made[0].equals(made[1])
    assert [len(choices) for choices in made[0].column("choices").to_pylist()] == [2] * 50


def test_a_replica_that_is_asked_for_another_job_than_the_output_holds_refuses(
    write_table: WriteTable, make_job: Callable[..., JobSpec], replica: Replica, out: Path
) -> None:
    table, job = prompts(3), make_job()
    storage.create_once(str(out / layout.JOB), record_of(job, table.schema).to_json())
    with pytest.raises(UnitError, match="but the driver asks for ffffffff"):
        replica.run(str(out), "f" * 64, unit_over(write_table(table), rows=3).to_dict())


def test_several_units_share_a_replica(write_table: WriteTable, make_job: Callable[..., JobSpec], replica: Replica, out: Path) -> None:
    table, job = prompts(60), make_job()
    path = write_table(table)
    ranges = [
        RowRange(uri=str(path), identity=identity_of(str(path)), row_start=20 * i, row_stop=20 * i + 20, position=20 * i) for i in range(3)
    ]
    units = [WorkUnit(index=index, ranges=(rows,)) for index, rows in enumerate(ranges)]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda unit: run_on(replica, job, table.schema, unit), units))
    assert [result["outcome"] for result in results] == ["created"] * 3
    made = pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))])
    assert made.column("id").to_pylist() == list(range(60))


def test_a_unit_in_memory_runs_as_one_on_disk(write_table: WriteTable, make_job: Callable[..., JobSpec], replica: Replica) -> None:
    table = prompts(300)
    storage.replace("memory://run-unit/in/a.parquet", write_table(table, row_group_size=50).read_bytes())
    job = make_job(input={"uri": "memory://run-unit/in"}, output={"uri": "memory://run-unit/out"})
    rows = RowRange(
        uri="memory://run-unit/in/a.parquet", identity=identity_of("memory://run-unit/in/a.parquet"), row_start=0, row_stop=300, position=0
    )
    result = run_on(replica, job, table.schema, WorkUnit(index=0, ranges=(rows,)))
    with storage.open_read("memory://run-unit/out/" + WorkUnit(index=0, ranges=()).part_name(result["report"]["fingerprint"])) as file:
        assert pq.read_table(file).column("id").to_pylist() == list(range(300))


def leave_after(count: int, begun: dict[int, list[int]] | None = None) -> Callable[[list[Request]], Iterator[Generation]]:
    """Answer some rows, in a shuffled order, then be asked to leave."""

    def answers(requests: list[Request]) -> Iterator[Generation]:
        yield from shuffled(requests)[:count]
        raise EngineEvicted("asked to leave", begun)

    return answers


@pytest.mark.parametrize("count", [0, 1, 150, 299])
def test_rows_that_an_evicted_replica_had_finished_are_not_generated_again(
    write_table: WriteTable, job: JobSpec, out: Path, count: int
) -> None:
    table = prompts(300)
    unit, first, second = unit_over(write_table(table), rows=300, position=40), SmallEngine(leave_after(count)), SmallEngine(shuffled)
    with pytest.raises(ReplicaLost, match=f"{count} finished rows were saved"):
        run_unit(unit, str(out), tools_for(job, table.schema, first))
    assert parts(out) == []
    report, outcome = run_unit(unit, str(out), tools_for(job, table.schema, second))
    assert (outcome, report.rows, report.resumed_rows, len(second.asked)) == ("created", 300, count, 300 - count)
    assert committed(out).select(["id", "prompt"]).equals(table)
    assert committed(out).column("completion").to_pylist() == table.column("prompt").to_pylist()
    assert report.completion_tokens == sum(len(text) + 1 for text in table.column("prompt").to_pylist())
    assert storage.list_names(folder_of(str(out), report.fingerprint, 0)) == {}


def test_a_part_is_the_same_whether_its_unit_was_interrupted_or_not(
    write_table: WriteTable, make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    job = make_job(input={"chat": False}, sampling={"logprobs": 0, "temperature": 1.0, "n": 2}, output={"token_ids": True})

    def with_logprobs(requests: list[Request]) -> list[Generation]:
        made = []
        for request in shuffled_requests(requests):
            values = [{"token_id": token, "logprob": -0.1, "top": [{"token_id": token, "logprob": -0.1}]} for token in request.token_ids]
            choice = GeneratedChoice(token_ids=request.token_ids, finish_reason="length", logprobs=values)
            made.append(Generation(position=request.position, choices=(choice, choice)))
        return made

    def leave(requests: list[Request]) -> Iterator[Generation]:
        yield from with_logprobs(requests)[:100]
        raise EngineEvicted("asked to leave")

    table = pa.table({"prompt": pa.array([None if index % 7 == 0 else f"row {index}" for index in range(300)])})
    unit = unit_over(write_table(table), rows=300)
    whole, _ = run_unit(unit, str(tmp_path / "a"), tools_for(job, table.schema, SmallEngine(with_logprobs)))
    for _ in range(2):
        with pytest.raises(ReplicaLost):
            run_unit(unit, str(tmp_path / "b"), tools_for(job, table.schema, SmallEngine(leave)))
    pieces, _ = run_unit(unit, str(tmp_path / "b"), tools_for(job, table.schema, SmallEngine(with_logprobs)))
    assert committed(tmp_path / "a").equals(committed(tmp_path / "b"))
    assert (whole.digest, whole.errors, whole.finish_reasons) == (pieces.digest, pieces.errors, pieces.finish_reasons)
    assert pieces.resumed_rows > 100


def shuffled_requests(requests: list[Request]) -> list[Request]:
    mixed = list(requests)
    random.Random(5).shuffle(mixed)
    return mixed


def test_a_row_in_mid_generation_goes_on_from_its_tokens_where_that_is_exact(
    write_table: WriteTable, make_job: Callable[..., JobSpec], out: Path
) -> None:
    job = make_job(input={"chat": False, "sampling": "sampling"})
    rows = [{"prompt": f"row {index}", "sampling": None} for index in range(3)]
    rows[1]["sampling"] = '{"stop": ["x"]}'
    table = pa.Table.from_pylist(rows)
    unit = unit_over(write_table(table), rows=3)
    with pytest.raises(ReplicaLost, match="0 finished rows"):
        run_unit(unit, str(out), tools_for(job, table.schema, SmallEngine(leave_after(0, {0: HI, 1: HI}))))
    second = SmallEngine(shuffled)
    run_unit(unit, str(out), tools_for(job, table.schema, second))
    assert {request.position: request.begun for request in second.asked} == {0: tuple(HI), 1: (), 2: ()}


@pytest.mark.parametrize(("begun", "max_model_len", "kept"), [(3, 100, 3), (7, 100, 7), (8, 100, 7), (9, 100, 7), (6, 15, 4), (6, 11, 0)])
def test_a_row_never_goes_on_from_all_that_it_may_become(begun: int, max_model_len: int, kept: int) -> None:
    """8 tokens are asked for, behind a prompt of 10."""
    request = Request(position=0, token_ids=list(range(10)), sampling=Sampling(max_tokens=8, temperature=0))
    assert resumed(request, tuple(range(begun)), max_model_len).begun == tuple(range(kept))


def test_rows_finished_before_an_engine_died_are_saved_too(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    def die(requests: list[Request]) -> Iterator[Generation]:
        yield from shuffled(requests)[:20]
        raise EngineDead("gone")

    table, second = prompts(50), SmallEngine(shuffled)
    unit = unit_over(write_table(table), rows=50)
    with pytest.raises(EngineDead, match="gone"):
        run_unit(unit, str(out), tools_for(job, table.schema, SmallEngine(die)))
    report, _ = run_unit(unit, str(out), tools_for(job, table.schema, second))
    assert (len(second.asked), report.resumed_rows) == (30, 20)


def test_a_row_that_kills_engines_becomes_an_error_row_and_all_others_are_done(write_table: WriteTable, job: JobSpec, out: Path) -> None:
    table = prompts(40)
    unit = unit_over(write_table(table), rows=40, position=100)
    deadly, deaths = 117, 0

    def maybe_die(requests: list[Request]) -> list[Generation]:
        if any(request.position == deadly for request in requests):
            raise EngineDead("gone")
        return shuffled(requests)

    engine = SmallEngine(maybe_die)
    tools = tools_for(job, table.schema, engine)
    while not parts(out):
        try:
            report, _ = run_unit(unit, str(out), tools)
        except EngineDead:  # as a supervisor does
            deaths += 1
            rows = {Tag(out_uri=str(out), fingerprint=tools.record.fingerprint, unit=0): frozenset(engine.calls[-1][0])}
            record_death(Flight(moved_at=0.0, steps=1, rows_finished=0, rows=rows), "signal SIGSEGV")
    made = committed(out)
    assert made.column("id").to_pylist() == list(range(40))
    assert [index for index, error in enumerate(made.column("error").to_pylist()) if error] == [17]
    assert made.column("error")[17].as_py() == {
        "kind": "kills_engine",
        "message": "engines died 2 times with this row alone in them: signal SIGSEGV",
    }
    assert report.errors == {"kills_engine": 1}
    assert deaths <= 9
    assert all(alone for _, alone in engine.calls[2:-1])
