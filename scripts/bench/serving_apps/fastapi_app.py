"""The echo in plain FastAPI, in the process that speaks HTTP: the least that an edge in Python costs."""

from typing import Any

from fastapi import FastAPI

app = FastAPI()


@app.post("/predict")
async def predict(item: dict[str, Any]) -> dict[str, Any]:
    return item
