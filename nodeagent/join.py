"""The node's own identity: made by joining with a one-time token, kept in the state directory (0600), renewed at half life.

The key is on disk before the token is used, and the token names its certificate authority, so nothing is trusted
on first sight.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import random
import ssl
import tempfile
import time
from pathlib import Path

import aiohttp
import msgspec
import structlog

from mesh.identity import IdentityError, NodeId, parse
from nodeagent.controller_client import CallFailed, CallRefused, ControllerClient, call
from nodeagent.files import private_directory, read_json, write_atomically
from nodeagent.keys import CertificateRefused, Leaf, Secret, bundle_text, make_csr, make_key, renew_at

log = structlog.get_logger()

TOKEN_BYTES_MAX = 64 << 10
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 15.0


class JoinError(RuntimeError):
    """The node has no identity and this attempt gave it none; the message says what to do."""


class Misplaced(RuntimeError):
    """The state directory is another node's; nothing in it was touched."""


class Token(msgspec.Struct, frozen=True):
    """What ``pillion node token <node>`` prints, decoded."""

    controller: tuple[str, ...]  # https URLs
    ca: str  # PEM
    node: str
    secret: str

    def __repr__(self) -> str:
        return f"Token(node={self.node!r}, …)"


class _Home(msgspec.Struct, frozen=True):
    """Where the node belongs; beside its key and certificate."""

    node: str
    controllers: tuple[str, ...]
    token: str = ""  # digest of the one it joined by


def read_token(text: str, node: str) -> Token:
    """Raises JoinError for text that is no token, or another node's."""
    remedy = f"make a new one: pillion node token {node}"
    try:
        padded = text.strip() + "=" * (-len(text.strip()) % 4)
        token = msgspec.json.decode(base64.urlsafe_b64decode(padded), type=Token)
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise JoinError(f"the join token cannot be read; {remedy}") from error
    if token.node != node:
        raise JoinError(f"the join token is for node {token.node!r}, this is {node!r}; {remedy}")
    if not token.controller or not all(url.startswith("https://") for url in token.controller):
        raise JoinError(f"the join token names no https controller; {remedy}")
    return token


def client_context(ca: str, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """TLS 1.3 towards a controller. Its address must be in its certificate: only controllers' certificates carry any.
    Raises JoinError when the roots or the key pair cannot be loaded."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=ca)
        if certificate is not None:
            context.load_cert_chain(*certificate)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise JoinError(f"the node's certificate or the mesh's roots cannot be used: {error}") from error
    return context


class NodeIdentity:
    """Key, chain and roots of this node; `context` is what the client uses."""

    def __init__(self, node: str, directory: Path, rng: random.Random | None = None) -> None:
        self.node = node
        self._directory = private_directory(directory)
        self._key_path, self._chain_path = directory / "node.key", directory / "node.pem"
        self._roots_path, self._home_path = directory / "bundle.pem", directory / "home.json"
        self._rng = rng or random.Random()
        self._context: ssl.SSLContext | None = None
        self._key: Secret | None = None
        self.leaf: Leaf | None = None
        self.controllers: tuple[str, ...] = ()
        self._token = ""
        self.counts = {"joined": 0, "refused": 0, "renewed": 0, "renew_failed": 0}

    def load(self) -> bool:
        """Whether a usable identity is on disk. A damaged or expired one is told in the log and not used. Raises Misplaced."""
        try:
            home = read_json(self._home_path, _Home)
            if home.node != self.node:
                raise Misplaced(f"{self._directory} belongs to node {home.node!r}; give this node another --state-dir")
            key = Secret(self._key_path.read_bytes())
            leaf = Leaf(self._chain_path.read_text())
            leaf.check(key, str(_node_id(leaf, self.node)))
            self._context = client_context(self._roots_path.read_text(), (self._chain_path, self._key_path))
        except FileNotFoundError:
            return False
        except (OSError, ValueError, JoinError) as error:  # Damaged and CertificateRefused among them
            log.warning("node_identity_unusable", error=str(error), remedy=f"join again: pillion node token {self.node}")
            return False
        self._key, self.leaf, self.controllers, self._token = key, leaf, home.controllers, home.token
        return True

    def joined_by(self, token: Token) -> bool:
        """Whether this token, good for once, made the present membership; renewals and restarts keep that."""
        return self._token == _digest(token)

    def context(self) -> ssl.SSLContext:
        """For connections to the controller. Raises CallFailed before the node has joined."""
        if self._context is None:
            raise CallFailed("this node has not joined yet")
        return self._context

    def trust(self, roots: tuple[str, ...]) -> None:
        """The mesh's bundle changed. Raises OSError; roots that cannot be loaded are refused and logged."""
        text = bundle_text(roots)
        try:
            if self._roots_path.read_text() == text:
                return
        except FileNotFoundError:
            pass
        try:
            context = client_context(text, (self._chain_path, self._key_path) if self.leaf else None)
        except JoinError as error:
            log.error("bundle_refused", error=str(error))
            return
        write_atomically(self._roots_path, text.encode(), 0o644)
        self._context = context if self.leaf else None

    async def join(self, token: Token) -> None:
        """One attempt. Raises JoinError (the controller's no, or an answer that is none), CallFailed (nobody answered)."""
        key, csr = self._pending()
        context = client_context(token.ca)
        body = {"node": self.node, "secret": token.secret, "csr": csr}
        failure: CallFailed | None = None
        async with aiohttp.ClientSession() as session:
            for url in token.controller:
                try:
                    answer = await call(session, "POST", url.rstrip("/") + "/v1/join", context, body)
                    break
                except CallFailed as error:
                    failure = error
                except CallRefused as error:
                    self.counts["refused"] += 1
                    raise JoinError(f"the controller refused the join ({error.reason}): {error}") from error
            else:
                raise failure or CallFailed("the token names no controller")
        self._accept(key, answer, token.controller, _digest(token))
        self.counts["joined"] += 1
        log.info("joined", node=self.node, serial=self.leaf.serial if self.leaf else "")

    def _pending(self) -> tuple[Secret, str]:
        """The key of an attempt that was interrupted, or a new one, and what it asks with."""
        pending = self._directory / "joining.key"
        try:
            key = Secret(pending.read_bytes())
            return key, make_csr(key, common_name=self.node)
        except (FileNotFoundError, CertificateRefused):
            key = make_key()
            write_atomically(pending, key.pem)
            return key, make_csr(key, common_name=self.node)

    def _accept(self, key: Secret, answer: dict[str, object], controllers: tuple[str, ...], token: str) -> None:
        chain, bundle = str(answer.get("chain", "")), answer.get("bundle", "")
        roots = bundle_text(bundle) if isinstance(bundle, list) else str(bundle)
        try:
            leaf = Leaf(chain)
            leaf.check(key, str(_node_id(leaf, self.node)))
        except CertificateRefused as error:
            raise JoinError(f"the controller's answer is not used: {error}") from error
        self._check_pair(key, chain, roots)
        # Key first: a crash in between leaves a pair that does not match, which `load` refuses, and a join follows.
        write_atomically(self._key_path, key.pem)
        write_atomically(self._chain_path, chain.encode())
        write_atomically(self._roots_path, roots.encode(), 0o644)
        write_atomically(self._home_path, msgspec.json.encode(_Home(self.node, controllers, token)))
        (self._directory / "joining.key").unlink(missing_ok=True)
        self._context = client_context(roots, (self._chain_path, self._key_path))
        self._key, self.leaf, self.controllers, self._token = key, leaf, controllers, token

    def _check_pair(self, key: Secret, chain: str, roots: str) -> None:
        """Loads what is about to replace the working files. Raises JoinError."""
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            pair = Path(scratch) / "chain", Path(scratch) / "key"
            for path, data in zip(pair, (chain.encode(), key.pem), strict=True):
                write_atomically(path, data)
            client_context(roots, pair)

    async def renew(self, client: ControllerClient) -> None:
        """A new key and certificate. Raises CallRefused, CallFailed, JoinError, OSError."""
        if self.leaf is None:
            raise CallFailed("this node has not joined yet")
        key = await asyncio.to_thread(make_key)
        answer = await client.renew(make_csr(key, self.leaf.uris[0]))
        answer["bundle"] = self._roots_path.read_text()  # by the stream: what was on its way here may be older
        self._accept(key, answer, self.controllers, self._token)
        self.counts["renewed"] += 1
        log.info("node_certificate_renewed", serial=self.leaf.serial if self.leaf else "")

    async def keep_renewed(self, client: ControllerClient) -> None:
        """Renews at half life, for ever; failures are retried until the certificate's end and after."""
        pause = RETRY_FIRST_S
        due: float | None = None
        while True:
            if due is None and self.leaf is not None:
                due = renew_at(self.leaf.not_before, self.leaf.not_after, self._rng)
            await asyncio.sleep(max(0.0, min((due or 0.0) - time.time(), 3600.0)))
            if due is not None and time.time() < due:
                continue
            try:
                await self.renew(client)
                pause, due = RETRY_FIRST_S, None
            except (CallRefused, CallFailed, JoinError, OSError) as error:
                self.counts["renew_failed"] += 1
                log.warning("node_certificate_not_renewed", error=str(error))
                due = time.time() + pause * self._rng.uniform(0.75, 1.25)
                pause = min(pause * 2, RETRY_MAX_S)


def _digest(token: Token) -> str:
    return hashlib.sha256(token.secret.encode()).hexdigest()


def token_of(token_file: Path | None, node: str) -> Token:
    """The token in the file. Raises JoinError."""
    if token_file is None:
        raise JoinError(f"this node has not joined and was given no --join-token-file; pillion node token {node}")
    try:
        with token_file.open("rb") as file:
            data = file.read(TOKEN_BYTES_MAX)
    except OSError as error:
        raise JoinError(f"{token_file}: {error.strerror}; pillion node token {node} > {token_file}") from error
    return read_token(data.decode("ascii", "replace"), node)


async def joined(identity: NodeIdentity, token_file: Path | None, rng: random.Random | None = None) -> None:
    """Returns when the node has an identity: from disk, or by the token, whose file is read at every attempt so that
    an operator can put a new one there. Raises Misplaced."""
    rng = rng or random.Random()
    pause = RETRY_FIRST_S
    if await asyncio.to_thread(identity.load):
        return
    while True:
        try:
            await identity.join(token_of(token_file, identity.node))
            return
        except (JoinError, CallFailed, OSError) as error:
            log.warning("not_joined", error=str(error), retry_s=round(pause, 1))
        await asyncio.sleep(pause * rng.uniform(0.75, 1.25))
        pause = min(pause * 2, RETRY_MAX_S)


def _node_id(leaf: Leaf, node: str) -> NodeId:
    """The identity the certificate names, if it is this node's. Raises CertificateRefused."""
    try:
        found = parse(leaf.uris[0]) if leaf.uris else None
    except IdentityError as error:
        raise CertificateRefused(str(error)) from error
    if not isinstance(found, NodeId) or found.name != node:
        raise CertificateRefused(f"the certificate names {', '.join(leaf.uris) or 'nobody'}, not node {node}")
    return found
