"""Text embedding and reranking: the model in its workers, OpenAI's API in front of it."""
