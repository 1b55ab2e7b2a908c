"""Which replica gets a batch: the one our dispatcher chose, for it knows who is idle. Loaded by Ray, by its name."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

CHOSEN = "replica"
"""The argument of a call that names its replica."""


class ChosenReplicaRouter(RequestRouter):
    """Routes nothing by itself."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """The replica the call names, where it is there; Ray asks again, ever later, until it is."""
        if pending_request is None:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True
        wanted = pending_request.kwargs.get(CHOSEN)
        return [[one for one in candidate_replicas if one.replica_id.unique_id == wanted]]
