"""An embedding service as tutorials write it: the model in the handler. Usage: naive_app.py MODEL PORT."""

import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

app = FastAPI()
model = SentenceTransformer(sys.argv[1], device="cpu", model_kwargs={"dtype": torch.bfloat16})


class Texts(BaseModel):
    model: str
    input: list[str]


@app.post("/v1/embeddings")
async def embed(texts: Texts) -> dict[str, list[dict[str, list[float]]]]:
    vectors = model.encode(texts.input, normalize_embeddings=True)
    return {"data": [{"embedding": vector} for vector in vectors.tolist()]}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
