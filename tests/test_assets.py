"""Static files of ours, as browsers and caches ask for them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from processes import ROOT, Server
from starlette.applications import Starlette
from starlette.routing import Mount

from assets import FILES, PAGE
from notifyd import create_app
from settings import Settings

HTML = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
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


# The console. tests/test_console.py has it in a browser.


async def answers(app: Any, *paths: str, **options: Any) -> list[httpx.Response]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return [await client.get(path, **options) for path in paths]


def test_a_browser_gets_the_console_and_a_program_the_index(server: Server) -> None:
    """Caches keep a form for each Accept, and ask with the hash of the page."""
    page = server.get("/", headers=HTML)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert (page.headers["vary"], page.headers["cache-control"]) == ("Accept", "no-cache")
    assert server.get("/", headers=HTML | {"If-None-Match": page.headers["etag"]}).status_code == 304
    assert server.request("HEAD", "/", headers=HTML).headers["etag"] == page.headers["etag"]
    assert server.read("/")["name"] == "notifyd"


def test_the_policy_of_the_console_is_strict(server: Server) -> None:
    """Nothing from elsewhere, nothing inline, no frame, and no text that becomes HTML."""
    headers = server.get("/", headers=HTML).headers
    policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
    closed = {name for name, value in policy.items() if value == "'none'"}
    assert closed == {"default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"}
    assert {value for name, value in policy.items() if name not in closed} == {"'self'", "'script'"}
    assert (headers["referrer-policy"], headers["x-content-type-options"]) == ("no-referrer", "nosniff")


def test_each_file_of_the_console_is_served(server: Server) -> None:
    """Those of the folder, and no other; the page names each script, so that all load at once."""
    names = {path.name for path in (ROOT / "console").iterdir()} - {"index.html"}
    assert {f"/console/{name}" for name in names} == FILES.keys() - {"/client.js"}
    assert {server.get(f"/console/{name}").status_code for name in names} == {200}
    page = (ROOT / PAGE).read_text()
    assert not [path for path in FILES if f'"{path[1:]}"' not in page]
    for name in ("index.html", "..%2Fsettings.py", "%2e%2e/settings.py", ""):
        assert server.get(f"/console/{name}").status_code == 404


def test_without_the_console_everybody_gets_json() -> None:
    """The files are gone, from the contract too; the client for pages stays."""
    app = create_app(Settings(console=False))
    index, file, client, contract = asyncio.run(
        answers(app, "/", "/console/app.js", "/client.js", "/openapi.json", headers=HTML)
    )
    assert index.json()["links"].keys() & {"console_file", "client_js"} == {"client_js"}
    assert (file.status_code, client.status_code) == (404, 200)
    assert "/console/{file}" not in contract.json()["paths"]
    assert contract.json()["paths"]["/"]["get"]["responses"]["200"]["content"].keys() == {"application/json"}


async def adds_a_slash(scope: Any, receive: Any, send: Any) -> None:
    """A host that routes an address without a slash to the app, as Litestar does."""
    app = create_app()
    await app({**scope, "path": "/notifications/", "root_path": "/notifications"}, receive, send)


def test_the_console_has_its_slash() -> None:
    """Its own addresses are relative to it."""
    [moved] = asyncio.run(answers(adds_a_slash, "/notifications?a=b", headers=HTML))
    assert (moved.status_code, moved.headers["location"]) == (307, "./notifications/")
    [page] = asyncio.run(answers(adds_a_slash, "/notifications/", headers=HTML))
    assert page.status_code == 200
