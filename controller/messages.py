"""What requests say, read strictly, and the answer that carries a certificate."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from aiohttp import web

from controller.ca import Authority, BadRequest, Issued, Request
from controller.events import Refused
from controller.server import answer
from mesh.identity import IdentityError, check_label

T = TypeVar("T")


def decode(data: bytes, kind: type[T]) -> T:
    """A JSON body; Refused (400) names the field that is wrong."""
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Refused("bad_request", f"body: {error}", 400) from error


def label(value: str, what: str) -> str:
    """``value`` if it is a name; Refused (400) otherwise."""
    try:
        return check_label(value, what)
    except IdentityError as error:
        raise Refused("bad_request", str(error), 400) from error


async def parse(csr: str) -> Request:
    """A verified certificate request, checked off the event loop; Refused (400) otherwise."""
    try:
        return await asyncio.to_thread(Request.parse, csr)
    except BadRequest as error:
        raise Refused("bad_csr", str(error), 400) from error


def certificate(issued: Issued, authority: Authority, **more: object) -> web.Response:
    """What was issued, with the roots to trust and what else the asker shall know."""
    chain, bundle = issued.chain, "".join(authority.bundle)
    return answer({"chain": chain, "bundle": bundle, "serial": issued.serial, "not_after": issued.not_after, **more})
