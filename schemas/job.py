"""JobSpec: what a user asks for. Read from YAML or built from keyword arguments; checked without touching anything."""

from __future__ import annotations

import json
from typing import Annotated
from typing import Any
from typing import Literal
from typing import Self
from urllib.parse import urlsplit

from pydantic import ConfigDict
from pydantic import Field
from pydantic import ValidationError
from pydantic import field_validator
from pydantic import model_validator

from schemas.address import check_address
from schemas.address import check_protection
from schemas.batch import CLIENT_ID
from schemas.batch import POOL_ID
from schemas.batch import RESOURCE_ID
from schemas.batch import ScheduleSpec
from schemas.batch import check_endpoint
from schemas.batch import check_keys_apart
from schemas.batch import check_reachable
from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.quality import QualitySpec
from schemas.sampling import Frozen
from schemas.sampling import Sampling
from schemas.storage import Commit
from schemas.storage import StorageSpec
from schemas.storage import looks_secret

DEMO_MODEL = "demo"


class PromptColumn(Frozen):
    """A text column."""

    column: str


class PromptMessages(Frozen):
    """A column of chat messages: a list of structs with role and content, or the same as JSON text."""

    messages: str


class PromptTemplate(Frozen):
    """Text with column names in braces, as in "Summarise: {body}"; {{ and }} are literal braces."""

    template: str


class InputSpec(Frozen):
    """Where the prompts are and how a row becomes a prompt."""

    uri: str | Annotated[list[str], Field(min_length=1)]
    """A file, a folder, a glob, or a list of them; a path or an fsspec URL (az://, abfss://, file://, memory://)."""
    prompt: str | PromptColumn | PromptMessages | PromptTemplate
    """A column's name, or a template if it has {braces}; a list-of-structs column is read as messages."""
    system: str | None = None
    """System prompt put before every text prompt; needs chat."""
    chat: bool | None = None
    """Whether to apply the model's chat template; by default yes where the tokenizer has one."""
    sampling: str | None = None
    """Column with a row's own sampling values: JSON text or a struct; null leaves the job's."""
    too_long: Literal["error", "truncate_left", "truncate_right"] = "error"
    """What to do with a prompt that leaves the model no room: an error row, or cut it at its left or right end."""
    schemas: Literal["same", "unify"] = "same"
    """Whether files whose schemas differ are refused, or read with their union (missing columns null)."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """Whether a file that cannot be read stops the job, or is left out and named."""

    @property
    def uris(self) -> list[str]:
        return [self.uri] if isinstance(self.uri, str) else list(self.uri)

    @property
    def source(self) -> PromptColumn | PromptMessages | PromptTemplate:
        if not isinstance(self.prompt, str):
            return self.prompt
        return PromptTemplate(template=self.prompt) if "{" in self.prompt else PromptColumn(column=self.prompt)

    @field_validator("uri")
    @classmethod
    def _not_empty(cls, uri: str | list[str]) -> str | list[str]:
        if not all([uri] if isinstance(uri, str) else uri):
            raise ValueError("an empty URI; give a path, a glob or an fsspec URL")
        for one in [uri] if isinstance(uri, str) else uri:
            _not_signed(one)
        return uri

    @model_validator(mode="after")
    def _possible_together(self) -> Self:
        if self.chat is False and self.system is not None:
            raise ValueError("system needs the chat template, but chat is false; put the text into a prompt template instead")
        if isinstance(self.source, PromptMessages):
            if self.chat is False:
                raise ValueError("prompt.messages needs the chat template, but chat is false")
            if self.system is not None:
                raise ValueError("system and prompt.messages: the messages carry their own system prompt; drop one of them")
        return self


class OutputSpec(Frozen):
    """Where the completions go."""

    uri: Annotated[str, Field(min_length=1)]
    """A folder: a path or an fsspec URL."""
    prefix: str = ""
    """Put before the names of the columns that Tokenmill adds, where they clash with the input's."""
    token_ids: bool = False
    """Also write the completion's token ids."""
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    commit: Commit = "put_if_absent"
    """overwrite: also write to stores that cannot create a name once. There is still one object per unit, but of two writers
    at the same moment the last one wins, so that a part may change after it was seen. Recorded in every part."""

    @field_validator("uri")
    @classmethod
    def _without_secrets(cls, uri: str) -> str:
        _not_signed(uri)
        return uri


def _not_signed(uri: str) -> None:
    if looks_secret(uri):
        raise ValueError("the URI carries a secret (not shown), and job files are stored and printed; name it under storage.credential")


class SimulatedOptions(Frozen):
    """The simulated engine: real scheduling of rows at stated rates, made-up tokens."""

    decode_tokens_per_s: float = Field(default=20_000.0, gt=0)
    prefill_tokens_per_s: float = Field(default=200_000.0, gt=0)
    max_num_seqs: int = Field(default=256, ge=1)
    start_s: float = Field(default=0.0, ge=0)
    nnodes: int = Field(default=1, ge=1)
    """Nodes that one replica spans; see jobs/cluster/README.md, Replicas over several nodes."""
    lengths: Literal["varied", "max"] = "varied"
    """Completion lengths: a fixed function of the prompt between 1 and max_tokens, or always max_tokens."""
    dies_on_token: int | None = None
    """For fault tests: the engine's process aborts when a row whose prompt holds this token enters the batch."""
    hangs_on_token: int | None = None
    """For fault tests: likewise, the engine never ends its step."""


class EngineSpec(Frozen):
    """What generates."""

    kind: Literal["vllm", "simulated"] = "vllm"
    profile: str = "auto"
    """The name of a hardware profile, or auto: chosen for the machine that is found."""
    options: dict[str, Any] = {}
    """For vllm: its engine arguments, over the profile's. For simulated: its rates."""
    ordering: Literal["auto", "off"] = "auto"
    """auto: the longest rows of those that wait go first, equal beginnings stay together, and of identical greedy rows one is
    generated and the others are copied. off: rows are generated one and all, in input order. Output order is always the input's."""

    @field_validator("ordering", mode="before")
    @classmethod
    def _off_is_a_word(cls, ordering: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return "off" if ordering is False else ordering

    @field_validator("options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        """They lie in job.json."""
        try:
            json.dumps(options)
        except (TypeError, ValueError, RecursionError):  # a date, bytes, or a YAML alias of what it stands in
            raise ValueError("options hold something that JSON cannot: give texts, numbers, booleans, lists and mappings") from None
        return options

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        if self.kind == "simulated":
            try:
                SimulatedOptions.model_validate(self.options)
            except ValidationError as error:
                raise ValueError("options of the simulated engine: " + describe_validation(error)) from None
        return self


_OF_ADDRESS = ("address", "rendezvous", "insecure", "leave_out")
_NEEDED_BY_BATCH = ("endpoint", "driver_pool", "worker_pool", "nodes", "image", "identity", "client_id", "keys")
_OF_BATCH = (*_NEEDED_BY_BATCH[:-1], "scratch", "max_hours", "preflight")


class ClusterSpec(Frozen):
    """Who runs the engines."""

    kind: Literal["local", "inline", "address", "azure-batch"] = "local"
    """local: worker processes on this machine. inline: one engine inside the calling process. address: a running
    `tokenmill scheduler` and the nodes whose `tokenmill worker` joined it. azure-batch: what `tokenmill submit` puts on two pools."""
    replicas: int | None = Field(default=None, ge=1)
    """Engine replicas; by default what the profile finds good for the machine. With address and azure-batch the nodes decide."""
    address: str | None = None
    """With kind address: the scheduler, as in tls://10.0.0.4:8786."""
    rendezvous: str | None = None
    """With kind address, instead of address: the folder or URI where the scheduler publishes its address."""
    keys: str | None = None
    """With kind address: the folder with the cluster's keys, as made by `tokenmill keys`. With azure-batch: a container of its own,
    as in az://tokenmill-keys, through which the driver hands the keys of each job to its nodes."""
    insecure: bool = False
    """With kind address: plain tcp://, over which whoever reaches a node's ports may run code there."""
    leave_out: list[str] = []
    """With kind address: names of nodes that get no unit of this job, as `tokenmill preflight` names slow ones."""
    metrics_port: int | None = Field(default=None, ge=1, le=64_000)
    """Serve metrics for Prometheus: the driver's on this port, those of each node's replica number n on this port + 1 + n."""
    metrics_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """The interface on which metrics are served. They ask for no password, and hold names and numbers alone."""
    endpoint: str | None = None
    """With azure-batch: the account, as in https://ACCOUNT.REGION.batch.azure.com."""
    driver_pool: Annotated[str | None, Field(pattern=POOL_ID)] = None
    """With azure-batch: the pool, on demand and without GPUs, on which the driver runs."""
    worker_pool: Annotated[str | None, Field(pattern=POOL_ID)] = None
    """With azure-batch: the pool of ND nodes."""
    nodes: int | None = Field(default=None, ge=1, le=1000)
    """With azure-batch: how many nodes to ask for at most, each with one `tokenmill worker`."""
    image: Annotated[str | None, Field(pattern=r"^[a-z0-9][A-Za-z0-9._/:@-]+$")] = None
    """With azure-batch: the container image of driver and workers, as in REGISTRY.azurecr.io/tokenmill:1.0."""
    identity: Annotated[str | None, Field(pattern=RESOURCE_ID)] = None
    """With azure-batch: the resource id of the user-assigned identity that both pools have."""
    client_id: Annotated[str | None, Field(pattern=CLIENT_ID)] = None
    """With azure-batch: that identity's client id, by which processes on the nodes ask for its tokens."""
    scratch: Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$")] = "/mnt/tokenmill"
    """With azure-batch: the nodes' local disk, which `tokenmill node-start` made; weights are kept there for all tasks of a node."""
    max_hours: int = Field(default=24, ge=1, le=720)
    """With azure-batch: Batch ends driver and workers after so many hours, whatever happens."""
    preflight: bool = False
    """With azure-batch: measure the nodes once they are there, before their first unit, and leave slow ones out."""

    def metrics_port_of(self, replica: int) -> int | None:
        """Of a node's replica number so much."""
        return None if self.metrics_port is None else self.metrics_port + 1 + replica

    @model_validator(mode="after")
    def _inline_is_one(self) -> Self:
        if self.kind == "inline" and self.replicas not in (None, 1):
            raise ValueError(f"kind inline runs one engine in one process, found replicas: {self.replicas}; use kind: local")
        return self

    @field_validator("endpoint")
    @classmethod
    def _of_a_batch_account(cls, endpoint: str | None) -> str | None:
        return None if endpoint is None else check_endpoint(endpoint)

    @model_validator(mode="after")
    def _only_what_its_kind_takes(self) -> Self:
        takers = {
            **dict.fromkeys(_OF_ADDRESS, ("address",)),
            **dict.fromkeys(_OF_BATCH, ("azure-batch",)),
            "keys": ("address", "azure-batch"),
        }
        for name, kinds in takers.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.kind not in kinds:
                raise ValueError(f"{name}: only kind: {' or kind: '.join(kinds)} takes it, found kind: {self.kind}")
        if self.kind in ("address", "azure-batch") and self.replicas is not None:
            raise ValueError(
                f"kind {self.kind} takes as many replicas as the nodes run; leave replicas out, see `tokenmill worker --replicas`"
            )
        return self

    @model_validator(mode="after")
    def _address_is_whole_and_safe(self) -> Self:
        if self.kind != "address":
            return self
        if (self.address is None) == (self.rendezvous is None):
            found = "both" if self.address else "neither"
            raise ValueError(f"kind address needs either address or rendezvous to find the scheduler, found {found}")
        if self.address is not None:
            check_address(self.address, self.keys, self.insecure)
        else:
            check_protection(self.keys, self.insecure)
        return self

    @model_validator(mode="after")
    def _batch_is_whole(self) -> Self:
        missing = [name for name in _NEEDED_BY_BATCH if getattr(self, name) is None]
        if self.kind == "azure-batch" and missing:
            raise ValueError(f"kind azure-batch also needs {', '.join(missing)}; infra/ prints them all when it has made the pools")
        return self


class LimitsSpec(Frozen):
    """When to give up."""

    attempts: int = Field(default=3, ge=1)
    """How often a unit of work is tried before it is reported as failed."""
    engine_silence_s: float = Field(default=300.0, gt=0)
    """An engine that has rows, and for so many seconds neither makes a token nor ends a row, hangs: its process is ended and started
    again. A single prompt may not take longer to read."""
    error_rows: int | None = Field(default=None, ge=0)
    """Start no further work, and end with exit code 3, once more rows than this came out as errors in one run."""
    quality: QualitySpec | None = None
    """Likewise when too many rows are bad: shares of errors, truncated, repeated or invalid_json."""
    deadline: str | None = None
    """Likewise when a run would not be done with what it begins by then: a length of time since its command, as in 8h, or a moment
    with its zone, as in 2026-11-27T06:00:00Z. What is in flight is finished and committed."""
    max_cost_usd: float | None = Field(default=None, gt=0)
    """Likewise when a run would cost more than this: its nodes' price from its command on."""
    usd_per_hour: float | None = Field(default=None, gt=0)
    """What a node costs; by default what the profile says, if it does."""


class JobSpec(Frozen):
    """One job: a table of prompts, a model, and where the completions go."""

    model_config = ConfigDict(hide_input_in_errors=True)

    name: str = Field(default="tokenmill", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    model: Annotated[str, Field(min_length=1)]
    """A folder with a Llama checkpoint, its URI, or `demo`."""
    input: InputSpec
    output: OutputSpec
    sampling: Sampling = Sampling()
    engine: EngineSpec = EngineSpec()
    cluster: ClusterSpec = ClusterSpec()
    canary: int | None = Field(default=None, ge=1)
    """Rows from all over the table that are run first, and shown, before the rest begins."""
    reuse: list[Annotated[str, Field(min_length=1)]] = []
    """Earlier outputs: rows whose request (model, template, token ids, sampling, seed) one of them has answered are taken over from
    there and not generated. No part of what the output is: a job may be gone on with, with more or fewer of them."""
    limits: LimitsSpec = LimitsSpec()
    storage: StorageSpec | None = None
    """How Azure storage is reached; names secrets, and holds none."""
    schedule: ScheduleSpec | None = None
    """When `tokenmill schedule create` has the job run, each time with what is new; `run` and `submit` run it once, now."""

    @property
    def lengths_vary(self) -> bool:
        """Whether rows say themselves how long they may become, and longest first is wanted."""
        return self.engine.ordering == "auto" and self.input.sampling is not None

    @field_validator("reuse")
    @classmethod
    def _reuse_without_secrets(cls, reuse: list[str]) -> list[str]:
        for uri in reuse:
            _not_signed(uri)
        return reuse

    @property
    def _places(self) -> list[tuple[str, str]]:
        """Field and URI of all that is read and written."""
        uris = [("input.uri", uri) for uri in self.input.uris] + [("reuse", uri) for uri in self.reuse]
        return [*uris, ("output.uri", self.output.uri)]

    @model_validator(mode="after")
    def _batch_reaches_everything(self) -> Self:
        cluster = self.cluster
        if cluster.kind != "azure-batch":
            if self.schedule is not None:
                raise ValueError(f"schedule: needs cluster.kind azure-batch, found {cluster.kind}; elsewhere use cron and `tokenmill run`")
            return self
        for field, uri in self._places:
            check_reachable(field, uri)
        if self.model != DEMO_MODEL and not self.model.startswith("/"):  # a path is one in the image
            check_reachable("model", self.model)
        check_keys_apart(str(cluster.keys), [*self.input.uris, self.output.uri, self.model])
        kind = self.storage.credential.kind if self.storage is not None else "default"
        if kind not in ("default", "managed_identity"):
            raise ValueError(f"storage.credential.kind is {kind}: nodes of Azure Batch have an identity and no keys; use managed_identity")
        return self

    @model_validator(mode="after")
    def _memory_stays_in_one_process(self) -> Self:
        if self.cluster.kind == "inline":
            return self
        for field, uri in self._places:
            if urlsplit(uri).scheme == "memory":
                raise ValueError(
                    f"{field} is {uri}: memory:// exists in one process only, and cluster.kind {self.cluster.kind} starts others; "
                    "use cluster.kind: inline, or a folder"
                )
        return self


def parse_job(data: Any) -> JobSpec:
    """Check a mapping as read from YAML. Raises JobError naming each wrong field, what is allowed and what was found."""
    if not isinstance(data, dict):
        raise JobError(f"a job is a mapping with model, input and output; found {type(data).__name__}")
    try:
        return JobSpec.model_validate(data)
    except ValidationError as error:
        raise JobError(describe_validation(error)) from None


def json_schema() -> str:
    """The job file's JSON Schema, with which editors complete and check it."""
    return json.dumps(JobSpec.model_json_schema(by_alias=True), indent=1) + "\n"
