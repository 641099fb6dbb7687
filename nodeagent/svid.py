"""The certificates of this node's workloads: asked for when a workload appears, rotated at half life, kept on disk
(0600) so that a restarted agent serves without its controller, dropped when expired, revoked or no longer wanted.

One task serves one identity; several workloads of an identity share its certificate.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from nodeagent.files import Damaged, private_directory, read_json, write_atomically
from nodeagent.keys import CertificateRefused, Leaf, Secret, make_csr, make_key, renew_at

log = structlog.get_logger()

RETRY_FIRST_S, RETRY_MAX_S = 0.3, 20.0
SIGNING_AT_ONCE_MAX = 4


class Held:
    """A certificate in use."""

    __slots__ = ("chain", "key", "leaf", "spiffe")

    def __init__(self, spiffe: str, chain: str, key: Secret, now: float | None = None) -> None:
        """Raises CertificateRefused."""
        self.spiffe, self.chain, self.key = spiffe, chain, key
        self.leaf = Leaf(chain).check(key, spiffe, now)


class _Stored(msgspec.Struct, frozen=True):
    spiffe: str
    chain: str
    key: str

    def __repr__(self) -> str:
        return f"_Stored({self.spiffe})"


class SvidDirectory:
    """One file per identity, key and chain together so that they always match."""

    def __init__(self, directory: Path) -> None:
        self._directory = private_directory(directory)
        self._sweep()

    def _sweep(self) -> None:
        """Keys that are good for nothing any more go: of identities that left while no agent was there, or that were just
        being written when theirs did. One that has time left waits for its workload."""
        for path in self._directory.iterdir():
            try:
                stored = read_json(path, _Stored)
                Held(stored.spiffe, stored.chain, Secret(stored.key.encode()))
            except (Damaged, CertificateRefused) as error:
                log.info("svid_file_swept", file=path.name, reason=str(error))
                path.unlink(missing_ok=True)

    def _path(self, spiffe: str) -> Path:
        return self._directory / hashlib.sha256(spiffe.encode()).hexdigest()[:40]

    def load(self, spiffe: str) -> Held | None:
        """None: absent, damaged or expired (then it is deleted)."""
        path = self._path(spiffe)
        try:
            stored = read_json(path, _Stored)
            return Held(spiffe, stored.chain, Secret(stored.key.encode()))
        except FileNotFoundError:
            return None
        except (Damaged, CertificateRefused) as error:
            log.warning("svid_file_dropped", spiffe=spiffe, reason=str(error))
            self.delete(spiffe)
            return None

    def save(self, held: Held) -> None:
        """Raises OSError."""
        stored = _Stored(held.spiffe, held.chain, held.key.pem.decode())
        write_atomically(self._path(held.spiffe), msgspec.json.encode(stored))

    def delete(self, spiffe: str) -> None:
        self._path(spiffe).unlink(missing_ok=True)


Sign = Callable[[str, str], Awaitable[str]]  # (csr PEM, spiffe) -> chain PEM; raises SignRefused or OSError kinds


class SignRefused(RuntimeError):
    """The controller's no; ``reason`` is its enum (identity_not_granted, …). Asked again later: a grant may come."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Svids:
    """Keeps `held` equal to what is wanted. ``on_held`` and ``on_gone`` run in the loop, right after the change."""

    def __init__(
        self,
        directory: SvidDirectory,
        sign: Sign,
        on_held: Callable[[Held], None],
        on_gone: Callable[[str], None],
        rng: random.Random | None = None,
    ) -> None:
        self._directory, self._sign = directory, sign
        self._on_held, self._on_gone = on_held, on_gone
        self._rng = rng or random.Random()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._now: dict[str, asyncio.Event] = {}  # wakes a task: rotate
        self._revoked: frozenset[str] = frozenset()
        self._signing = asyncio.Semaphore(SIGNING_AT_ONCE_MAX)
        self.held: dict[str, Held] = {}
        self.errors: dict[str, str] = {}
        self.counts = {"issued": 0, "refused": 0, "failed": 0, "expired": 0, "revoked": 0}

    def want(self, spiffes: frozenset[str]) -> None:
        """Exactly these. Keys of the others are deleted."""
        for spiffe in self._tasks.keys() - spiffes:
            self._forget(spiffe)
        for spiffe in spiffes - self._tasks.keys():
            self._now[spiffe] = asyncio.Event()
            self._tasks[spiffe] = asyncio.create_task(self._serve(spiffe), name=f"svid {spiffe}")

    def _forget(self, spiffe: str) -> None:
        self._tasks.pop(spiffe).cancel()
        del self._now[spiffe]
        self.errors.pop(spiffe, None)
        self._directory.delete(spiffe)
        self._drop(spiffe)

    def _drop(self, spiffe: str) -> None:
        if self.held.pop(spiffe, None) is not None:
            self._on_gone(spiffe)

    def revoke(self, revoked: frozenset[str]) -> frozenset[str]:
        """Serials (hex) that may not be used any more: dropped at once, a new key is made. The identities that had one."""
        self._revoked = revoked
        hit = frozenset(spiffe for spiffe, held in self.held.items() if held.leaf.serial in revoked)
        for spiffe in hit:
            self.counts["revoked"] += 1
            log.warning("svid_revoked", spiffe=spiffe, serial=self.held[spiffe].leaf.serial)
            self._directory.delete(spiffe)
            self._drop(spiffe)
            self._now[spiffe].set()
        return hit

    def rotate(self) -> int:
        """Rotate all now; returns how many. The old ones serve until the new ones are there."""
        for event in self._now.values():
            event.set()
        return len(self._now)

    async def close(self) -> None:
        """Stop; what is on disk stays for the next agent."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self._now.clear()

    async def _serve(self, spiffe: str) -> None:
        due = 0.0
        stored = await asyncio.to_thread(self._directory.load, spiffe)
        if stored is not None and stored.leaf.serial not in self._revoked:
            self._take(stored)
            due = renew_at(stored.leaf.not_before, stored.leaf.not_after, self._rng)
        retry_s = RETRY_FIRST_S
        while True:
            await self._sleep(spiffe, due)
            held = self.held.get(spiffe)
            if held is not None and held.leaf.not_after <= time.time():
                self.counts["expired"] += 1
                log.error("svid_expired", spiffe=spiffe)
                self._drop(spiffe)
            try:
                fresh = await self._issue(spiffe)
            except Exception as error:  # any answer, or none: the next try is the remedy
                self.counts["refused" if isinstance(error, SignRefused) else "failed"] += 1
                self.errors[spiffe] = f"{error}" or type(error).__name__
                log.warning("svid_not_issued", spiffe=spiffe, error=self.errors[spiffe], retry_s=round(retry_s, 1))
                due = time.time() + retry_s * self._rng.uniform(0.75, 1.25)
                held = self.held.get(spiffe)
                if held is not None:  # wake for its end
                    due = min(due, max(held.leaf.not_after, time.time()))
                retry_s = min(retry_s * 2, RETRY_MAX_S)
                continue
            retry_s = RETRY_FIRST_S
            self.errors.pop(spiffe, None)
            self._take(fresh)
            due = renew_at(fresh.leaf.not_before, fresh.leaf.not_after, self._rng)

    async def _sleep(self, spiffe: str, due: float) -> None:
        event = self._now[spiffe]
        try:
            async with asyncio.timeout(max(due - time.time(), 0.0)):
                await event.wait()
        except TimeoutError:
            pass
        event.clear()

    async def _issue(self, spiffe: str) -> Held:
        async with self._signing:
            key = await asyncio.to_thread(make_key)
            chain = await self._sign(make_csr(key, spiffe), spiffe)
            held = Held(spiffe, chain, key)
            await asyncio.to_thread(self._directory.save, held)
            self.counts["issued"] += 1
            return held

    def _take(self, held: Held) -> None:
        self.held[held.spiffe] = held
        log.info("svid_held", spiffe=held.spiffe, serial=held.leaf.serial, not_after=held.leaf.not_after)
        self._on_held(held)
