"""JobRecord: the job as it was accepted, with all that decides its output. Lies in out/_tokenmill/job.json; workers read it there."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import parse_job


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """An accepted job. Two runs with equal fingerprints want the same output.

    Without slots, so that what every unit asks for is worked out once.
    """

    job: dict[str, Any]
    """The JobSpec as plain data, URIs absolute."""
    decides: dict[str, Any]
    """What the output depends on: plan, prompt, digests of weights, tokenizer and template, sampling, columns, engine kind."""
    schema: str
    """The input's Arrow schema, serialised, base64."""
    tool_version: str

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.decides, sort_keys=True).encode()).hexdigest()

    @cached_property
    def spec(self) -> JobSpec:
        return parse_job(self.job)

    @cached_property
    def input_schema(self) -> pa.Schema:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.schema)))

    def to_json(self) -> bytes:
        return json.dumps({**asdict(self), "fingerprint": self.fingerprint}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> JobRecord:
        """Raises ValueError where it is not what `to_json` wrote."""
        try:
            values = json.loads(data)
            said = values.pop("fingerprint")
            record = cls(**values)
            whole = record.fingerprint == said and isinstance(record.decides["plan"], str) and isinstance(record.tool_version, str)
            _ = record.spec, record.input_schema
        except JobError as error:
            raise ValueError(f"its job is none: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if not whole:
            raise ValueError("its fingerprint is not that of what it holds")
        return record

    def differences(self, other: JobRecord) -> list[str]:
        """What decides the output and is not the same in the other record, one line each."""
        keys = sorted(set(self.decides) | set(other.decides))
        pairs = [(key, self.decides.get(key), other.decides.get(key)) for key in keys]
        return [
            f"{key}: this job has {_short(mine)}, the output was begun with {_short(theirs)}"
            for key, mine, theirs in pairs
            if mine != theirs
        ]


def encode_schema(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
