"""The torch engine's `Trainer`: many adapters over one frozen base model, all in the same packed micro-batches."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from tinkercloud.engine.base_model import AdapterMemory, EngineOptions
from tinkercloud.engine.operations import (
    AdamStep,
    ClearGradients,
    CreateModel,
    DropModel,
    ForwardBackward,
    LoadWeights,
    OperationError,
    OptimStep,
    SaveWeights,
    TrainOperation,
)
from tinkercloud.engine.protocol import Turns
from tinkercloud.engine.results import Done, Failure, LoadOutput, Result, SaveOutput, StepOutput
from tinkercloud.engine.torch.adapter import Adapter, layout_of
from tinkercloud.engine.torch.adapter_store import AdapterStore
from tinkercloud.engine.torch.attention import PackedAttention
from tinkercloud.engine.torch.checkpoints import Draft, draft_adapter, read_adapter, read_training_state
from tinkercloud.engine.torch.logprobs import TargetLogprobs
from tinkercloud.engine.torch.lora import LoraBatch, Segment
from tinkercloud.engine.torch.loss_run import LossRun
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.optimizer import take_step
from tinkercloud.engine.torch.packing import TILE_TOKENS, Pack, Tile, micro_batch
from tinkercloud.engine.torch.shelf import StateLost, shelf_for
from tinkercloud.engine.validation import check_forward_backward

log = logging.getLogger(__name__)

R = TypeVar("R")

SHORT_SECONDS = 0.1
"""How long a micro-batch should take while somebody waits for its end. One of TILE_TOKENS takes as long as it takes."""

SYNCED_TOGETHER = 16
"""Saves that wait for the disk at a time."""

DISK_SECONDS = 0.01
"""How long they wait for it between two turns of others."""


class TorchTrainer:
    """See `engine.protocol.Trainer`."""

    def __init__(self, model: BaseModel, options: EngineOptions, scratch: Path | None = None) -> None:
        """`scratch`: a folder of this trainer's own, for idle adapters beyond the budget."""
        self.info = model.info
        self._model, self._options = model, options
        self._keepable_tokens = model.info.activations.tokens
        self._token_budget = max(1, min(options.token_budget, self._keepable_tokens))
        self._tokens_per_second = 0.0
        """Of the last micro-batch."""
        self._adapters = AdapterStore(options.adapter_memory, shelf_for(model.device, scratch), model.dtype)

    def run(self, cycle: Sequence[TrainOperation], turns: Turns) -> list[Result]:
        """Run operations of different models to completion; a result, or a `Failure`, for each in its place."""
        models = [operation.model_id for operation in cycle]
        if len(set(models)) < len(models):
            raise ValueError("a cycle has at most one operation of each model")
        results: list[Result] = [Done()] * len(cycle)
        losses: dict[str, int] = {}
        for place, operation in enumerate(cycle):
            if isinstance(operation, ForwardBackward):
                losses[operation.model_id] = place
            elif not isinstance(operation, SaveWeights):
                results[place] = _guarded(self._run_alone, operation)
                turns.next()
        saves = {place: operation for place, operation in enumerate(cycle) if isinstance(operation, SaveWeights)}
        for place, result in self._run_saves(saves, turns).items():
            results[place] = result
        for part in self._adapters.parts(list(losses)):
            operations = {place: cycle[place] for place in map(losses.__getitem__, part)}
            for place, result in self._run_losses(operations, turns).items():
                results[place] = result
        return results

    @property
    def adapter_memory(self) -> AdapterMemory:
        """What the adapters take now."""
        return self._adapters.memory

    # ------------------------------------------------------------ forward and forward_backward

    def _run_losses(self, operations: dict[int, ForwardBackward], turns: Turns) -> dict[int, Result]:
        """Run operations whose adapters can be resident together; each one's result."""
        if len(operations) > 1:
            self._adapters.bring([operation.model_id for operation in operations.values()])
        results: dict[int, Result] = {}
        runs: dict[int, LossRun] = {}
        for place, operation in operations.items():
            run = _guarded(self._prepare, operation)
            (runs if isinstance(run, LossRun) else results)[place] = run
        for training in (True, False):
            results |= self._run_packed({p: run for p, run in runs.items() if run.training == training}, turns)
        return results

    def _prepare(self, operation: ForwardBackward) -> LossRun:
        adapter = self._adapter(operation.model_id)
        check_forward_backward(operation, self.info)
        return LossRun(operation, adapter, self._token_budget)

    def _run_packed(self, runs: dict[int, LossRun], turns: Turns) -> dict[int, Result]:
        """Run all tiles of these runs (all with or all without backward) in shared micro-batches; each run's result."""
        waiting = {place: deque(run.tiles) for place, run in runs.items()}
        broken: dict[int, Exception] = {}
        while batch := micro_batch(waiting, self._budget(turns)):
            try:
                self._run_micro_batch([(runs[place], tile) for place, tile in batch])
            except Exception as error:
                for place, _ in batch:
                    broken[place] = error
                    waiting.pop(place, None)
            turns.next()

        results: dict[int, Result] = {}
        for place, run in runs.items():
            if place in broken:
                continue
            try:
                results[place] = run.finish()
            except Exception as error:
                results[place] = _failure(run.operation, error)
        for place, error in broken.items():
            if len(runs) == 1:
                results[place] = _failure(runs[place].operation, error)
            else:
                # Whose fault it was shows when each runs by itself; the others then end as if nothing had been.
                runs[place].start_over()
                results |= self._run_packed({place: runs[place]}, turns)
        return results

    def _budget(self, turns: Turns) -> int:
        """Tokens of the next micro-batch: a short one if somebody waits for its end."""
        if not turns.wanted:
            return self._token_budget
        return min(self._token_budget, max(TILE_TOKENS, int(self._tokens_per_second * SHORT_SECONDS)))

    def _run_micro_batch(self, members: Sequence[tuple[LossRun, Tile]]) -> None:
        """Forward, loss and, if the runs are training, backward of one packed batch."""
        training = members[0][0].training
        started = time.perf_counter()
        pack = Pack([tile for _, tile in members], self._model.device, self._model.row_multiple)
        lora = LoraBatch(_segments(members, pack.starts))
        with torch.set_grad_enabled(training):
            # A single datum that is too long: several are cut into micro-batches that are not.
            recompute = training and sum(tile.num_tokens for _, tile in members) > self._keepable_tokens
            attention = PackedAttention(pack.lengths)
            hidden = self._model.hidden_states(pack.tokens, pack.positions, attention, lora, recompute)
        with torch.no_grad():
            logprobs = TargetLogprobs(
                self._model,
                hidden.detach(),
                pack.rows,
                pack.targets,
                lora,
                self._options.logits_bytes,
                with_entropies=any(run.wants_entropies for run, _ in members),
            )
            parts = zip(members, pack.per_tile(logprobs.values), pack.per_tile(logprobs.entropies), strict=True)
            gradient = torch.cat([run.take(tile, values, entropies) for (run, tile), values, entropies in parts])
            if training and gradient.any():
                d_hidden = logprobs.backward(gradient)
                hidden.backward(d_hidden)
        self._tokens_per_second = len(pack.tokens) / (time.perf_counter() - started)

    # ------------------------------------------------------------ everything else

    def _run_alone(self, operation: TrainOperation) -> Result:
        match operation:
            case CreateModel(model_id, lora, optimizer):
                if model_id in self._adapters:
                    raise OperationError(f"there is already a model {model_id}")
                device, dtype = self._model.device, self._model.dtype
                layout = layout_of(lora, self._model.linears)
                self._adapters.make_room(self._adapters.whole_bytes(layout, optimizer))
                self._adapters[model_id] = Adapter.fresh(lora, layout, device, dtype, optimizer)
            case OptimStep(model_id, params) | AdamStep(model_id, params):
                self._model.use_all_threads()
                return StepOutput(take_step(self._adapter(model_id), params))
            case LoadWeights():
                return self._load(operation)
            case ClearGradients(model_id):
                self._adapter(model_id).gradient = None
            case DropModel(model_id):
                self._adapters.pop(model_id)
            case _:
                raise TypeError(f"{type(operation).__name__} is no operation of a trainer")
        return Done()

    def _run_saves(self, operations: dict[int, SaveWeights], turns: Turns) -> dict[int, Result]:
        """Write all of them, then wait for the disk once for several: it syncs many files in about the time of one."""
        results: dict[int, Result] = {}
        drafts: dict[int, Draft] = {}
        for place, operation in operations.items():
            if drafts:
                turns.next()
            draft = _guarded(self._draft, operation)
            (drafts if isinstance(draft, Draft) else results)[place] = draft
        with ThreadPoolExecutor(min(len(drafts), SYNCED_TOGETHER) or 1, thread_name_prefix="sync") as threads:

            def publish(place: int) -> SaveOutput | Failure:
                size = _guarded(lambda _: drafts[place].publish(), operations[place])
                return size if isinstance(size, Failure) else SaveOutput(operations[place].folder, size)

            published = {place: threads.submit(publish, place) for place in drafts}
            while wait(published.values(), DISK_SECONDS).not_done:
                turns.next()
        return results | {place: future.result() for place, future in published.items()}

    def _draft(self, operation: SaveWeights) -> Draft:
        return draft_adapter(
            self._adapter(operation.model_id),
            self._model,
            Path(operation.folder),
            with_optimizer=operation.with_optimizer,
            with_gradients=operation.with_gradients,
            replace=operation.replace,
            external_to=operation.recipients if operation.external else None,
        )

    def _load(self, operation: LoadWeights) -> LoadOutput:
        folder = Path(operation.folder)
        saved = read_adapter(folder, self._model)
        current = self._adapters.get(operation.model_id)
        if current is not None and not current.layout.same_as(saved.layout):
            raise OperationError(
                f"the checkpoint's adapter (rank {saved.config.rank}) is not laid out as this model's (rank "
                f"{current.config.rank}) or adapts other layers; create a new model from the checkpoint instead"
            )
        parameters = saved.parameters.to(self._model.device)
        optimizer = operation.optimizer if current is None else current.optimizer
        adapter = Adapter(saved.config, saved.layout, parameters, self._model.dtype, optimizer)
        read_training_state(
            folder, adapter, with_optimizer=operation.with_optimizer, with_gradients=operation.with_gradients
        )
        if current is not None and adapter.optimizer != current.optimizer:
            raise OperationError(
                f"the checkpoint's optimizer state is {adapter.optimizer}'s, and this model's optimizer is "
                f"{current.optimizer}; load without optimizer state, or create a new model from the checkpoint"
            )
        self._adapters[operation.model_id] = adapter
        return LoadOutput(saved.config)

    def _adapter(self, model_id: str) -> Adapter:
        adapter = self._adapters.get(model_id)
        if adapter is None:
            raise OperationError(f"there is no model {model_id} in this engine; create it or load a checkpoint first")
        return adapter


def _segments(members: Sequence[tuple[LossRun, Tile]], starts: Sequence[int]) -> Iterator[Segment]:
    """The adapter of each run over its tiles, which lie side by side, from the rows at which they begin."""
    for _, own in groupby(zip(members, starts, strict=False), key=lambda placed: id(placed[0][0])):
        placed = list(own)
        run = placed[0][0][0]
        yield run.segment(placed[0][1], [tile for (_, tile), _ in placed])


def _guarded(run: Callable[[Any], R], operation: TrainOperation) -> R | Failure:
    """What running an operation gives, or why it failed. StateLost ends the engine."""
    try:
        return run(operation)
    except StateLost:
        raise
    except Exception as error:
        return _failure(operation, error)


def _failure(operation: TrainOperation, error: Exception) -> Failure:
    if isinstance(error, OperationError):
        return Failure(str(error), "user")
    log.error("%s of %s failed", type(operation).__name__, operation.model_id, exc_info=error)
    if isinstance(operation, SaveWeights) and isinstance(error, OSError | SafetensorError):
        return Failure(
            f"the weights could not be written ({error}); what was there before is there, and the training run goes "
            "on: save them again when the server's disk has room or is mended",
            "server",
        )
    return Failure(f"{type(operation).__name__} failed in the engine: {type(error).__name__}: {error}", "server")
