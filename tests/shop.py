"""A host that test_package.py runs beside the installed wheel: a shop with a module of its own for each name of ours.

It type-checks under mypy --strict in its own environment, where `hub` and `settings` are the shop's.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import assert_type

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

import hub
import settings
from notifyd import App, Hub, Receipt, Settings, create_app

MINE = Path(__file__).parent


def shops_own() -> bool:
    """Import every module of the shop, and return whether each of them is the shop's."""
    modules = [import_module(path.stem) for path in MINE.glob("*.py")]
    return settings.OWNER == hub.OWNER == "shop" and all(Path(str(each.__file__)).parent == MINE for each in modules)


notifications = create_app(Settings(notification_interval=0))
assert_type(notifications, App)
assert_type(notifications.hub, Hub)


async def order(request: Request) -> JSONResponse:
    """Publish from inside, as a host does."""
    receipt: Receipt = await notifications.hub.notify("A new order", type="order", data={"number": 17})
    return JSONResponse({"recipients": receipt.recipients, "shops_own": shops_own()})


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    async with notifications.hub:
        yield


app = Starlette(
    routes=[Route("/order", order, methods=["POST"]), Mount("/notifications", app=notifications)],
    lifespan=lifespan,
)
