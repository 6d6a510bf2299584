"""The shop of shop.py in FastAPI."""

from fastapi import FastAPI
from shop import shops_own

from notifyd import Settings, create_app

notifications = create_app(Settings(notification_interval=0))
app = FastAPI()
app.mount("/notifications", notifications)


@app.post("/order")
async def order() -> dict[str, int | bool]:
    receipt = await notifications.hub.notify("A new order", type="order", data={"number": 17})
    return {"recipients": receipt.recipients, "shops_own": shops_own()}
