"""What went wrong in Azure Batch, by the code that the service gives it: the cause and the next step. Pure; knows no SDK.

Codes: Microsoft's "Batch status and error codes" and PoolResizeErrorCodes of the SDKs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SKEW_S = 300.0
"""Tokens are good from some minutes before they are issued; beyond that a clock that is off gets them refused."""

_ROLE = "give the identity the role Azure Batch Job Submitter on the Batch account (it takes minutes to be felt)"
_QUOTA = "ask for more under Quotas on the Batch account's page"
_SPOT_QUOTA = "ask for spot cores of this series under Quotas on the subscription's page"
_SPOT = "spot nodes are free capacity that others bid for: wait, allow on-demand nodes in the pool, or use another region or size"
_REQUESTS = {
    "AuthenticationFailed": f"the service refused the token: sign in again (az login), check the tenant, and {_ROLE}",
    "InvalidAuthenticationInfo": "the service could not read the token: sign in again (az login)",
    "PermissionDenied": _ROLE,
    "AuthorizationFailure": _ROLE,
    "AuthorizationFailed": _ROLE,
    "InsufficientAccountPermissions": _ROLE,
    "InsufficientPermissions": _ROLE,
    "AccountNotFound": "no Batch account has this name: check cluster.endpoint on the account's page",
    "AccountIsDisabled": "the Batch account is disabled: ask who runs the subscription",
    "ActiveJobAndScheduleQuotaReached": f"the account has as many active jobs and schedules as it may: end some, or {_QUOTA}",
    "JobScheduleExists": "there is a schedule of this name: `tokenmill schedule delete` it first, or give the job another name",
    "JobScheduleNotFound": "there is no such schedule: `tokenmill schedule list` shows them all",
    "JobNotFound": "there is no such job any more; what it committed stays in the output",
    "JobCompleted": "the job is over; submit it again",
    "JobBeingDeleted": "it is being deleted: try again in a minute",
    "JobScheduleBeingDeleted": "it is being deleted: try again in a minute",
    "PoolNotFound": "there is no such pool in this account: deploy infra/, or correct the name",
    "InvalidPropertyValue": "the service does not accept a value: compare with `tokenmill submit --dry-run`",
    "ServerBusy": "the service is busy: try again in a minute",
    "OperationTimedOut": "the service took too long: look whether it happened (`tokenmill status`), then try again",
}
_RESIZES = {
    "AccountCoreQuotaReached": f"the account has no cores left for this size: {_QUOTA}",
    "AccountVMSeriesCoreQuotaReached": f"the account has no cores left for this series: {_QUOTA}",
    "AccountSpotCoreQuotaReached": f"the subscription has no spot cores left for this series: {_SPOT_QUOTA}",
    "AccountLowPriorityCoreQuotaReached": f"the subscription has no spot cores left for this series: {_SPOT_QUOTA}",
    "AllocationFailed": f"the region has no such machines free just now. If the pool is of spot nodes: {_SPOT}",
    "AllocationTimedOut": f"the region did not give all nodes in time; Batch goes on asking when the pool is resized. {_SPOT}",
    "AllocationTimedout": f"the region did not give all nodes in time; Batch goes on asking when the pool is resized. {_SPOT}",
    "CommunicationEnabledPoolReachedMaxVMCount": "pools whose nodes talk to each other have a limit: make the pool smaller",
    "DependentResourceNotFound": "something that the pool names (subnet, image, identity) is gone: deploy infra/ again",
    "FailedIdentityOperation": "the pool's identity is gone, or may not be assigned: deploy infra/ again",
    "IncompatibleVMSize": "the size does not go with the pool's image or settings: see infra/",
    "ResizeStopped": "somebody stopped the pool's resize: `az batch pool resize` starts it again",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolState:
    """One pool, as the service describes it."""

    id: str
    state: str
    vm_size: str
    autoscale: bool
    target_nodes: int
    current_nodes: int
    slots_per_node: int
    containers: bool
    identities: tuple[str, ...]
    errors: tuple[tuple[str, str], ...]
    """Code and message of why the last resize, or the autoscale formula, failed."""


def explain(*, doing: str, code: str, message: str, status: int | None, skew_s: float | None) -> str:
    """A sentence or two for one refused request. `skew_s`: how far this machine's clock is ahead of the service's, where known."""
    said = f"{doing}: Azure Batch said {code or status}: {message}"
    if status in (401, 403) and skew_s is not None and abs(skew_s) > SKEW_S:
        which = "ahead of" if skew_s > 0 else "behind"
        clock = f"This machine's clock is {abs(skew_s) / 60:.0f} minutes {which} the service's"
        return f"{said}. {clock}, so tokens look unborn or expired: set it (timedatectl)"
    advice = _REQUESTS.get(code) or (_ROLE if status in (401, 403) else "see the service's message; `--dry-run` shows what is sent")
    return f"{said}. What to do: {advice}"


def resize_problems(pool: PoolState) -> list[str]:
    """Why a pool did not get its nodes, a sentence for each reason."""
    found = []
    for code, message in pool.errors:
        advice = _RESIZES.get(code, "see the pool's page")
        has = f"pool {pool.id} ({pool.vm_size}) has {pool.current_nodes} of {pool.target_nodes} nodes"
        found.append(f"{has}: {code}: {message}. What to do: {advice}")
    return found


def pool_problem(pool: PoolState | None, field: str, pool_id: str, identity: str, *, one_task_a_node: bool) -> str | None:
    """Why a pool cannot run our tasks, before anything is sent. Batch itself takes the job, and its tasks then wait for ever."""
    where = f"cluster.{field}: pool {pool_id}"
    if pool is None:
        return f"{where} does not exist in this account; deploy infra/, or correct the name"
    if pool.state != "active":
        return f"{where} is {pool.state}, expected active; wait, or deploy infra/ again"
    if not pool.containers:
        return f"{where} runs no containers; its virtual machine configuration needs a container configuration, see infra/"
    if identity.lower() not in {known.lower() for known in pool.identities}:
        return (
            f"{where} does not have the identity {identity}; its tasks could read nothing. Deploy infra/ again, or correct cluster.identity"
        )
    if one_task_a_node and pool.slots_per_node != 1:
        return f"{where} runs {pool.slots_per_node} tasks a node, expected 1: each `tokenmill worker` takes a node's GPUs whole"
    if not pool.autoscale and not pool.target_nodes:
        return f"{where} has no nodes and does not scale by itself; resize it (az batch pool resize), or give it infra/'s autoscale formula"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskState:
    """One task, as the service describes it."""

    id: str
    state: str
    exit_code: int | None
    failure: str | None
    """Why Batch could not run it, or what its exit means."""
    retries: int
    requeues: int
    node: str | None


def ended_words(tasks: Sequence[TaskState]) -> str:
    """How tasks ended that should not have, a few words for each."""
    words = [f"{task.id}: {task.failure or f'exit code {task.exit_code}'}" for task in tasks[:5]]
    return "; ".join(words) + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else "")
