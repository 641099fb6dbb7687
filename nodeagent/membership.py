"""The node as a member of its mesh: joins, follows the controller's stream, registers its workloads, has certificates signed.
Everything it learns becomes an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from mesh import snapshot
from nodeagent import reconcile_events as ev
from nodeagent.controller_client import CallFailed, CallRefused, ControllerClient
from nodeagent.join import JoinError, NodeIdentity, joined, token_of
from nodeagent.local_workloads import LocalWorkloads
from nodeagent.options import Options
from nodeagent.workloads import Spec

log = structlog.get_logger()

REJOIN_REASONS = frozenset({"node_cut", "certificate_unknown", "certificate_revoked", "certificate_expired", "wrong_role"})


class Membership:
    """`follow` runs for ever; before it has joined, every call fails with CallFailed."""

    def __init__(
        self, options: Options, workloads: LocalWorkloads, post: Callable[[ev.Event], None], resume: Callable[[], int]
    ) -> None:
        self._options, self._workloads, self._post, self._resume = options, workloads, post, resume
        self.identity = NodeIdentity(options.node, options.state_dir)
        self._client: ControllerClient | None = None
        self._refused = ""  # the last reason
        self._tried = ""  # secret of the token that was answered last

    @property
    def client(self) -> ControllerClient:
        if self._client is None:
            raise CallFailed("this node has not joined yet")
        return self._client

    @property
    def error(self) -> str:
        """Why there is no stream; empty: there is one."""
        return self._client.last_error if self._client is not None else "this node has not joined yet"

    @property
    def heard_at(self) -> float:
        """`lease.boot_s`; 0: never."""
        return self._client.heard_at if self._client is not None else 0.0

    async def follow(self) -> None:
        """Joins if need be, then follows the stream and keeps the node's certificate fresh."""
        await joined(self.identity, self._options.join_token_file)
        urls = list(self._options.controllers or self.identity.controllers)
        self._client = ControllerClient(urls, self.identity.context)
        renewing = asyncio.create_task(self.identity.keep_renewed(self._client), name="renew")
        try:
            await self._client.follow(
                resume=self._resume,
                on_up=lambda: self._post(ev.ControllerUp()),
                on_message=self._heard,
                on_down=lambda _: self._post(ev.ControllerDown()),
                on_refused=self._not_let_in,
            )
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def send(self, message: snapshot.AgentMessage) -> None:
        """Dropped when no stream is open."""
        if self._client is not None:
            self._client.send(message)

    def reconnect(self) -> None:
        if self._client is not None:
            self._client.reconnect()

    def trust(self, roots: tuple[str, ...]) -> None:
        """The mesh's bundle changed. Raises OSError."""
        if self.identity.leaf is not None:
            self.identity.trust(roots)

    def _heard(self, message: snapshot.ServerMessage | snapshot.SnapshotError) -> None:
        if isinstance(message, snapshot.SnapshotError):
            self._post(ev.Garbled(str(message)))
        elif not isinstance(message, snapshot.Ping):
            self._refused = ""
            self._post(ev.Received(message))

    async def _not_let_in(self, reason: str) -> bool:
        """Whether the node has joined again meanwhile."""
        if reason != self._refused:
            self._refused = reason
            log.error("not_let_in", reason=reason, remedy=f"pillion node token {self._options.node} admits the node again")
        if reason == "node_cut":
            self._post(ev.CutOff())
        if reason not in REJOIN_REASONS:
            return False
        tried = self._tried
        try:
            token = token_of(self._options.join_token_file, self._options.node)
            if token.secret == tried or self.identity.joined_by(token):  # each is good for once
                return False
            self._tried = token.secret
            await self.identity.join(token)
        except (JoinError, CallFailed, OSError) as error:
            if isinstance(error, CallFailed):  # nobody answered: it may still be good
                self._tried = tried
            log.warning("not_joined_again", error=str(error))
            return False
        return True

    async def sign(self, csr: str, spiffe: str) -> str:
        """The chain, PEM. Raises CallRefused, CallFailed."""
        return await self.client.sign(csr, spiffe)

    async def register(self, spec: Spec) -> None:
        """Asks once; the answer is an event."""
        try:
            revision = await self.client.register(spec)
        except CallRefused as error:
            log.warning("registration_refused", workload=spec.key, reason=error.reason, error=str(error))
            self._post(ev.RegisterRefused(spec, error.reason, str(error)))
        except CallFailed as error:
            self._post(ev.RegisterFailed(spec, str(error)))
        else:
            await self._workloads.registered(spec.key)
            self._post(ev.Registered(spec, revision))

    async def unregister(self, key: str) -> None:
        """Asks once; the answer is an event."""
        try:
            await self.client.unregister(key)
        except CallRefused as error:  # not ours any more
            log.warning("unregistration_refused", workload=key, reason=error.reason)
        except CallFailed as error:
            self._post(ev.Unregistered(key, str(error)))
            return
        await self._workloads.unregistered(key)
        self._post(ev.Unregistered(key))
