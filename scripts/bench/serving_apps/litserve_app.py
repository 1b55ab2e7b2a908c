"""The model under LitServe. Usage: litserve_app.py PORT."""

import sys
from typing import Any

import litserve  # type: ignore[import-not-found]
import model


class Bench(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        model.tell(0)

    def predict(self, x: Any) -> Any:
        return model.run(x) if model.MAX_BATCH > 1 else model.run([x])[0]


if __name__ == "__main__":
    wait_s = 0.01 if model.MAX_BATCH > 1 else 0.0
    api = Bench(max_batch_size=model.MAX_BATCH, batch_timeout=wait_s)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=model.WORKERS, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
