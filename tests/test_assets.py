"""Static files of ours, as browsers and caches ask for them."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from processes import ROOT, Server
from starlette.applications import Starlette
from starlette.routing import Mount

from notifyd import create_app

CLIENT = (ROOT / "clients" / "js" / "client.js").read_bytes()


def test_the_client_for_pages_is_the_one_of_the_package(server: Server) -> None:
    """Byte for byte, as a script, with a tag, and without a body for HEAD."""
    answer, head = server.get("/client.js"), server.request("HEAD", "/client.js")
    assert answer.content == CLIENT
    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert head.content == b"" and head.headers["content-length"] == str(len(CLIENT))
    assert head.headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize("form", ["{}", "W/{}", '"another", {}', '"another",W/{}', "*"])
def test_a_client_that_has_the_file_gets_it_no_second_time(server: Server, form: str) -> None:
    """Its tag may be one of several, and a proxy may have made it weak."""
    tag = server.get("/client.js").headers["etag"]
    again = server.get("/client.js", headers={"If-None-Match": form.format(tag)})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("held", ['"another"', "", "tag", '"*"'])
def test_a_client_that_has_another_file_gets_this_one(server: Server, held: str) -> None:
    """Only equal tags, or a bare asterisk, mean the same file."""
    assert server.get("/client.js", headers={"If-None-Match": held}).content == CLIENT


def test_a_file_is_served_under_a_mount() -> None:
    """The index names it there."""
    app = Starlette(routes=[Mount("/notifications", app=create_app())])

    async def ask() -> tuple[str, bytes]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            link = (await client.get("/notifications/")).json()["links"]["client_js"]
            return link, (await client.get(link)).content

    assert asyncio.run(ask()) == ("/notifications/client.js", CLIENT)
