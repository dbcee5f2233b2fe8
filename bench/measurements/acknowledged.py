"""What it costs that an operation is acknowledged only when the disk has it."""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median
from typing import Any

from bench.measurement import Measurement
from bench.readings import Goal, Readings, interleaved
from bench.stage import RANK, Stage, seconds

BYTES = 100_000
"""Of the operation as it is stored."""

OPERATIONS = 20
"""In one reading, whose median counts; each begins when the one before has ended."""

ROWS = 64
TARGETS = BYTES // ROWS // 12
"""Weighted targets of each row; each is an int64 and a float32."""


class Sender:
    """A training run whose requests are written by hand, so that the acknowledgement can be timed by itself."""

    def __init__(self, url: str, base_model: str) -> None:
        import httpx

        self._http = httpx.Client(base_url=f"{url}/api/v1", timeout=60, headers={"X-API-Key": "tml-bench"})
        session = self._post("create_session", tags=[], sdk_version="bench")["session_id"]
        made = self._post(
            "create_model", session_id=session, model_seq_id=0, base_model=base_model, lora_config={"rank": RANK}
        )
        self._model, self._seq_id = made["model_id"], 0
        self._wait(made)
        shape = [ROWS, TARGETS]
        self._datum = {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": list(range(1, ROWS + 1))}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [7] * (ROWS * TARGETS), "dtype": "int64", "shape": shape},
                "weights": {"data": [1.0] * (ROWS * TARGETS), "dtype": "float32", "shape": shape},
            },
        }

    def acknowledged(self) -> float:
        """Median seconds until an operation is acknowledged."""
        return median(self._one() for _ in range(OPERATIONS))

    def _one(self) -> float:
        self._seq_id += 1
        accepted: dict[str, Any] = {}

        def send() -> None:
            accepted.update(
                self._post(
                    "forward",
                    model_id=self._model,
                    seq_id=self._seq_id,
                    forward_input={"data": [self._datum], "loss_fn": "cross_entropy"},
                )
            )

        took = seconds(send)
        self._wait(accepted)
        return took

    def _wait(self, accepted: dict[str, Any]) -> None:
        while self._post("retrieve_future", request_id=accepted["request_id"]).get("type") == "try_again":
            pass

    def _post(self, route: str, **body: Any) -> dict[str, Any]:
        answer = self._http.post(route, json=body)
        answer.raise_for_status()
        return answer.json()


def take(stage: Stage, repeat: int) -> Readings:
    """Seconds until an operation is acknowledged, by a server that waits for the disk and by one that does not."""
    from tinkercloud.cli.local_server import running_server

    with ExitStack() as stack:
        senders = []
        for sync in ("true", "false"):
            folder = stage.folder / f"sync_to_disk-{sync}"
            folder.mkdir()
            options = [*stage.served, "--set", f"sync_to_disk={sync}"]
            server = stack.enter_context(running_server(folder, options))
            senders.append(Sender(server.url, stage.shape.name))
        durable, other = senders
        return interleaved(durable.acknowledged, [other.acknowledged], repeat)


ACKNOWLEDGED = Measurement(
    "acknowledged",
    f"an operation of {BYTES // 1000} kB, until it is acknowledged",
    "without sync_to_disk",
    Goal("added_seconds", 0.005),
    take,
)
