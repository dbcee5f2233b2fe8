"""What the measurements share: a base model, a server on it, a client of that server, and the competitor. Each is made
when it is first asked for and ends with the stage."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.competitor import Competitor, thread_counts
from bench.data import Example, token_rows
from bench.model import SMALL, Shape, make_model

if TYPE_CHECKING:
    import tinker

    from tinkercloud.cli.local_server import LocalServer

RANK = 16
ALPHA = 32.0
LEARNING_RATE = 1e-4


class Stage:
    """See the module's docstring."""

    def __init__(self, folder: Path, stack: ExitStack, shape: Shape = SMALL, vllm_python: Path | None = None) -> None:
        """Everything is written under `folder` and ended by `stack`; `shape` is the base model's; `vllm_python` that of
        an environment that has vLLM."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.shape = shape
        self._vllm_python = vllm_python
        self._stack = stack
        self._gemm_rate = 0.0
        self._tenants: list[tinker.TrainingClient] = []
        self._seeds = itertools.count(1)
        self._samplers: list[tinker.SamplingClient] = []

    @cached_property
    def model_folder(self) -> Path:
        return make_model(self.shape, self.folder / "model")

    @property
    def served(self) -> list[str]:
        """A server's options."""
        return ["--model", f"{self.shape.name}={self.model_folder}"]

    @cached_property
    def server(self) -> LocalServer:
        """A server with the settings that a user gets, on the bench's model."""
        from tinkercloud.cli.local_server import running_server

        folder = self.folder / "server"
        folder.mkdir()
        return self._stack.enter_context(running_server(folder, self.served))

    @cached_property
    def by_hand(self) -> Competitor:
        """torch + PEFT, by hand."""
        competitor = Competitor("bench.by_hand", self.model_folder)
        self._stack.callback(competitor.close)
        return competitor

    @cached_property
    def by_vllm(self) -> Competitor:
        """vLLM, in an environment of its own."""
        assert self._vllm_python is not None
        competitor = Competitor("bench.by_vllm", self.model_folder, ("passive",), python=str(self._vllm_python))
        self._stack.callback(competitor.close)
        return competitor

    @cached_property
    def engine_alone(self) -> Competitor:
        """The server's engine without the server, in the environment that it has in the server."""
        from tinkercloud.control.engine_process import engine_environment

        alone = Competitor("bench.engine_alone", self.model_folder, ("passive",), engine_environment())
        self._stack.callback(alone.close)
        return alone

    def gemm_rate(self) -> float:
        """The machine's best at matrix products so far, floating point operations a second."""
        size, threads = 2048, thread_counts()[-1]
        for _ in range(5):
            seconds = self.engine_alone.seconds("product", wait="passive", threads=threads, size=size)
            self._gemm_rate = max(self._gemm_rate, 2 * size**3 / seconds)
        return self._gemm_rate

    @property
    def chosen_settings(self) -> dict[str, dict[str, Any]]:
        """The settings with which each competitor was fastest, by task."""
        competitors = [vars(self)[name] for name in ("by_hand", "by_vllm") if name in vars(self)]
        return {task: settings for competitor in competitors for task, settings in competitor.chosen.items()}

    @cached_property
    def client(self) -> tinker.ServiceClient:
        import tinker

        client = tinker.ServiceClient(base_url=self.server.url, api_key="tml-bench")
        self._stack.callback(client.holder.close)
        return client

    @cached_property
    def training(self) -> tinker.TrainingClient:
        """A LoRA adapter on all linear layers, as the competitor's."""
        return self.new_run()

    def new_run(self) -> tinker.TrainingClient:
        """One more of these."""
        return self.client.create_lora_training_client(base_model=self.shape.name, rank=RANK, seed=0).result()

    def tenants(self, count: int) -> list[tinker.TrainingClient]:
        """The first `count` of some training runs beside each other."""
        while len(self._tenants) < count:
            self._tenants.append(self.new_run())
        return self._tenants[:count]

    def new_prompts(self, rows: int, tokens: int) -> list[tinker.ModelInput]:
        """Prompts that nobody has sent before: the server keeps those that it has read."""
        return prompts(rows, tokens, next(self._seeds))

    @cached_property
    def sampler(self) -> tinker.SamplingClient:
        """The adapter's weights as they are when this is first asked for."""
        return self.training.save_weights_and_get_sampling_client().result()

    def samplers(self, count: int) -> list[tinker.SamplingClient]:
        """Of `count` adapters, `sampler`'s the first."""
        while len(self._samplers) < count - 1:
            run = self.tenants(len(self._samplers) + 1)[-1]
            self._samplers.append(run.save_weights_and_get_sampling_client().result())
        return [self.sampler, *self._samplers[: count - 1]]


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def waits(futures: Sequence[Future[Any]], sent: float) -> list[float]:
    """Seconds from `sent`, of `time.perf_counter`, until each has its result."""
    ended = {future: time.perf_counter() - sent for future in as_completed(futures)}
    for future in futures:
        future.result()
    return [ended[future] for future in futures]


def batch(examples: Sequence[Example]) -> list[tinker.Datum]:
    """A batch of `bench.data` as a client sends it."""
    from tinker import types

    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens.tolist()),
            loss_fn_inputs={"target_tokens": targets, "weights": weights},
        )
        for tokens, targets, weights in examples
    ]


def prompts(rows: int, tokens: int, seed: int = 0) -> list[tinker.ModelInput]:
    """Prompts of random tokens; with the seed 0, the competitor's."""
    from tinker import types

    return [types.ModelInput.from_ints(row.tolist()) for row in token_rows(rows, tokens, seed)]
