"""Draws continuations from a base model and any number of its adapters, all in one batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import CancelSample, CloseSampler, FindSample, OpenSampler, OperationError, Sample
from tinkercloud.engine.results import Done, Failure, Place, Result, SamplerLoad
from tinkercloud.engine.torch.adapter import frozen_weights
from tinkercloud.engine.torch.attention import Attention
from tinkercloud.engine.torch.batching import ContinuousBatch, Turn
from tinkercloud.engine.torch.checkpoints import read_adapter
from tinkercloud.engine.torch.decode_window import CacheRows, DecodeWindows
from tinkercloud.engine.torch.in_place_attention import InPlaceAttention
from tinkercloud.engine.torch.kernels.compiled import kernels_for
from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS, KVCache, LayerShape, pages_for
from tinkercloud.engine.torch.lora import AdapterWeights, LoraBatch, SampledLora, Segment
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.paged_attention import PagedAttention
from tinkercloud.engine.torch.prefix_cache import Namespace
from tinkercloud.engine.torch.prompt_scoring import check_scoring
from tinkercloud.engine.torch.quarantine import Quarantine
from tinkercloud.engine.torch.sampler_memory import memory_of
from tinkercloud.engine.torch.sampling import check_params, draw, top_logprobs
from tinkercloud.engine.torch.sequences import OpenedSampler, Request
from tinkercloud.engine.torch.softmax import log_softmax
from tinkercloud.engine.torch.state_cache import StateCache, state_bytes
from tinkercloud.engine.torch.stopping import Tokenizer

log = logging.getLogger(__name__)

WINDOW_SHARE = 0.25
"""Of `kv_cache_bytes`: what `DecodeWindows` may take, where attention needs them."""

STATE_SHARE = 0.5
"""Of `kv_cache_bytes`: what linear attention's states may take. The rest, without windows and states, are pages."""

_LOGIT_BYTES = 4
"""Logits are float32."""


class TorchSampler:
    """The `engine.protocol.Sampler` over a transformers model. A request's fault is answered to it alone."""

    def __init__(self, model: BaseModel, options: EngineOptions) -> None:
        self.info = model.info
        self._model = model
        self._logit_rows = max(1, options.logits_bytes // (_LOGIT_BYTES * model.info.vocab_size))
        self._tokenizer = Tokenizer(model.info.folder, options.trust_remote_code)
        memory = memory_of(model)
        in_place = kernels_for(model.dtype, model.device)
        window_bytes = 0 if in_place else int(options.kv_cache_bytes * WINDOW_SHARE)
        page_bytes = options.kv_cache_bytes - window_bytes
        sequences, self._states = options.max_decode_batch, None
        if memory.states:
            slot = state_bytes(memory.states)
            # Some more than may run, for copies (`state_cache`): else none is left where all places are taken.
            slots = max(1, min(sequences * 3 // 2 + 1, int(options.kv_cache_bytes * STATE_SHARE) // slot))
            sequences = max(1, min(sequences, slots - slots // 8))
            page_bytes -= slots * slot
            self._states = StateCache(memory.states, slots)
            if sequences < options.max_decode_batch:
                log.warning(
                    "at most %d sequences of %s decode together, not max_decode_batch = %d: a state takes %d bytes, "
                    "and states at most %d of kv_cache_bytes = %d",
                    sequences, model.info.name, options.max_decode_batch, slot,
                    int(options.kv_cache_bytes * STATE_SHARE), options.kv_cache_bytes,
                )  # fmt: skip
        self._cache = _cache_for(model, memory.layers, page_bytes, options.kv_cache_bytes)
        self._windows = DecodeWindows(self._cache, window_bytes, model.device)
        self._batch = ContinuousBatch(self._cache, sequences, self._states, keeps_drawn=model.has_whole_steps)
        self._quarantine = Quarantine(self._batch)
        self._samplers: dict[str, OpenedSampler] = {}
        self._shared: WeakValueDictionary[str, OpenedSampler] = WeakValueDictionary()
        """Mutable weights, for as long as a sampler or a request has them."""
        self._opened = 0
        self._requests: dict[str, Request] = {}
        self._ended: list[tuple[str, Result]] = []

    def open(self, operation: OpenSampler) -> Result:
        """Load the weights; opening the same folder under the same id again changes nothing."""
        known = self._shared.get(operation.shared) if operation.shared else self._samplers.get(operation.sampler_id)
        if known is not None and known.folder == operation.folder:
            if not known.prefixes.open:  # nobody had it any more but for a request that still runs
                known.prefixes = Namespace()
            self._samplers[operation.sampler_id] = known
            return Done()
        if known is not None and not operation.shared:
            return Failure(f"sampler {operation.sampler_id} is open already, with other weights", "server")
        adapter = None
        if operation.folder:
            try:
                adapter = self._load(Path(operation.folder))
            except OperationError as error:
                return Failure(str(error), "user")
            except torch.AcceleratorError:
                raise
            except (OSError, RuntimeError) as error:
                return Failure(f"the sampler's weights cannot be read: {error}", "server")
        if known is not None:  # shared weights that change: what was kept of prompts is not theirs
            self._batch.forget(known.prefixes)
            known.folder, known.adapter, known.prefixes = operation.folder, adapter, Namespace()
        elif operation.shared:
            known = self._shared[operation.shared] = self._new(operation.folder, adapter, operation.owner)
        else:
            known = self._of_the_same_weights(operation, adapter)
        self._samplers[operation.sampler_id] = known
        return Done()

    def close(self, operation: CloseSampler) -> Result:
        """Take no more requests. The weights live on for those that it has, which hold them."""
        sampler = self._samplers.pop(operation.sampler_id, None)
        if sampler is not None and sampler not in self._samplers.values():
            self._batch.forget(sampler.prefixes)
        return Done()

    def _new(self, folder: str, adapter: AdapterWeights | None, owner: str) -> OpenedSampler:
        self._opened += 1
        return OpenedSampler(self._opened, folder, adapter, owner)

    def _of_the_same_weights(self, operation: OpenSampler, adapter: AdapterWeights | None) -> OpenedSampler:
        """The owner's sampler that is open with the same weights, whose prompts are kept once; or a new one, which has
        its weights in common with other owners' if they have them open."""
        mutable = set(map(id, self._shared.values()))
        same = [
            sampler
            for sampler in self._samplers.values()
            if id(sampler) not in mutable
            and sampler.folder == operation.folder
            and (adapter is None or adapter.equal(sampler.adapter))
        ]
        own = next((sampler for sampler in same if sampler.owner == operation.owner), None)
        if own is not None:
            return own
        if same:
            return OpenedSampler(same[0].order, operation.folder, same[0].adapter, operation.owner)
        return self._new(operation.folder, adapter, operation.owner)

    def submit(self, operation: Sample) -> None:
        """Check a request and let it wait; a bad one is answered by the next step."""
        if operation.request_id in self._requests:
            return
        try:
            request = self._checked(operation)
        except OperationError as error:
            self._ended.append((operation.request_id, Failure(str(error), "user")))
            return
        except Exception as error:
            log.exception("sample %s cannot be taken up", operation.request_id)
            self._ended.append(
                (operation.request_id, Failure(f"the engine failed on this sample: {error!r}", "server"))
            )
            return
        self._requests[operation.request_id] = request
        self._batch.add(request)

    def cancel(self, operation: CancelSample) -> Result:
        """Free a request's memory now; its `Failure` comes from the next step."""
        request = self._requests.get(operation.request_id)
        if request is not None:
            self._fail(request, Failure("the sample was cancelled", "user"))
        return Done()

    def find(self, operation: FindSample) -> Place:
        """Whether a request has begun, and what all take."""
        request = self._requests.get(operation.request_id)
        begun = request is None or any(one.pages or one.generated for one in request.sequences)
        return Place(begun, self.load)

    @property
    def load(self) -> SamplerLoad:
        """How many sequences run and wait, and the pages that they hold."""
        batch, cache = self._batch, self._cache
        return SamplerLoad(
            batch.num_waiting, batch.max_sequences, batch.num_running, cache.used, cache.used + cache.free
        )

    @property
    def busy(self) -> bool:
        return self._batch.busy or bool(self._ended)

    @property
    def pages_used(self) -> int:
        """Pages of the KV cache that sequences hold; 0 when nothing runs."""
        return self._cache.used

    @property
    def pages_kept(self) -> int:
        """Pages that no sequence holds, but that have prompts which are found again; they give way to what runs."""
        return self._cache.idle

    @property
    def states_used(self) -> int:
        """Slots of linear attention's states that sequences hold; 0 when nothing runs."""
        return self._states.used if self._states else 0

    @property
    def num_running(self) -> int:
        """Sequences that hold pages; the rest wait."""
        return self._batch.num_running

    @property
    def preemptions(self) -> int:
        """Times that a sequence was interrupted for want of pages, since the start; many mean too small a cache."""
        return self._batch.preemptions

    def step(self) -> list[tuple[str, Result]]:
        """Admit what fits, run every running sequence's next tokens, answer what has ended.

        What fails in the computation is answered to the request that fails alone; the others are computed again.
        """
        with torch.inference_mode():
            turns = self._batch.schedule()
            if turns:
                try:
                    self._advance(turns)
                    self._quarantine.passed()
                except torch.AcceleratorError:
                    raise  # the device is of no use to this process any more: nothing would succeed, guilty or not
                except Exception as error:
                    log.exception("a sampling step of %d sequences failed; its requests run apart", len(turns))
                    why = f"the engine failed on this sample, also alone: {type(error).__name__}: {error}"
                    for guilty in self._quarantine.failed(turns):
                        if guilty.operation.request_id in self._requests:  # else it was answered before the failure
                            self._fail(guilty, Failure(why, "server"))
        ended, self._ended = self._ended, []
        return ended

    def _load(self, folder: Path) -> AdapterWeights:
        saved = read_adapter(folder, self._model)
        parameters = saved.parameters.to(self._model.device)
        return frozen_weights(saved.layout, parameters, saved.config.alpha / saved.config.rank, self._model.dtype)

    def _checked(self, operation: Sample) -> Request:
        """The request behind an operation. Raises `OperationError`."""
        sampler = self._samplers.get(operation.sampler_id)
        if sampler is None:
            raise OperationError(f"there is no open sampler {operation.sampler_id}; make a new sampling client")
        prompt, vocab, length = operation.prompt, self.info.vocab_size, operation.num_tokens
        if prompt.ndim != 1 or length == 0:
            raise OperationError("the prompt is empty; it needs at least one token")
        if prompt.min() < 0 or prompt.max() >= vocab:
            wrong = prompt[(prompt < 0) | (prompt >= vocab)][0]
            raise OperationError(f"token id {wrong} in the prompt is not in the vocabulary, 0 to {vocab - 1}")
        check_params(operation.params)
        if length + operation.params.max_tokens > self.info.max_context:
            raise OperationError(
                f"prompt length plus max_tokens exceeds the model's context window: "
                f"{length} + {operation.params.max_tokens} > {self.info.max_context}"
            )
        if operation.num_samples < 1:
            raise OperationError(f"num_samples is {operation.num_samples}; it must be at least 1")
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
            if not 0 <= getattr(operation, name) <= vocab:
                raise OperationError(f"{name} is {getattr(operation, name)}; it must be 0 to {vocab}")
        check_scoring(operation, vocab)
        return Request(operation, sampler, self._tokenizer.stop_condition(operation.params))

    def _advance(self, turns: list[Turn]) -> None:
        """Run the turns' tokens through the model, then score prompts and draw next tokens from what comes out."""
        device = self._model.device
        tokens = [token for sequence, count in turns for token in sequence.next_tokens(count)]
        positions = [sequence.cached + i for sequence, count in turns for i in range(count)]
        filling = [0] * self._model.filling(len(tokens))
        step = [
            CacheRows(sequence.pages, sequence.cached, count, sequence.slot, prefill=not sequence.holds_prompt)
            for sequence, count in turns
        ]
        attention: Attention
        if self._cache.has_kernels:
            attention = InPlaceAttention(self._cache, step, self._states)
        else:
            attention = PagedAttention(self._cache, step, device, self._windows, self._states)
        lora = _lora(turns)
        hidden = self._model.hidden_states(
            torch.tensor(tokens + filling, device=device),
            torch.tensor(positions + filling, device=device),
            attention,
            lora,
        )
        drawing: list[Turn] = []
        rows: list[int] = []
        first = 0
        for sequence, count in turns:
            start, sequence.cached = sequence.cached, sequence.cached + count
            if not sequence.request.scores.complete:
                self._score_prompt(sequence.request, start, hidden[first : first + count])
            first += count
            if sequence.cached == sequence.num_tokens:
                drawing.append((sequence, 1))
                rows.append(first - 1)
        if len(rows) < len(hidden):
            hidden = hidden[torch.tensor(rows, dtype=torch.int64, device=device)]
        for begin in range(0, len(drawing), self._logit_rows):
            some = drawing[begin : begin + self._logit_rows]
            is_whole_step = len(some) == len(turns) == len(tokens)
            self._draw(some, hidden[begin : begin + self._logit_rows], lora if is_whole_step else _lora(some))

    def _draw(self, turns: list[Turn], hidden: Tensor, lora: LoraBatch) -> None:
        """Draw one token for each sequence from the hidden state [n, H] of its last one; `lora` has their adapters."""
        params = [sequence.request.operation.params for sequence, _ in turns]
        uniforms = [sequence.random.random() for sequence, _ in turns]
        logits = self._model.logits(hidden, lora)
        plain = [row for row, (sequence, _) in enumerate(turns) if sequence.request.untempered]
        untempered = log_softmax(logits[plain]) if plain else None  # before `draw` overwrites them
        drawn = draw(logits, params, uniforms)
        raw_logprobs: dict[int, float] = {}
        if untempered is not None:
            values = untempered.gather(-1, drawn.tokens[plain, None])[:, 0]
            raw_logprobs = dict(zip(plain, values.tolist(), strict=True))
        most = max(sequence.request.operation.topk_sample_logprobs for sequence, _ in turns)
        if most:
            distribution = drawn.distribution
            if untempered is not None:
                for place, row in enumerate(plain):
                    if turns[row][0].request.operation.raw_logprobs:
                        distribution[row] = untempered[place]
            top_ids, top_values = top_logprobs(distribution, most)
        for row, (token, logprob) in enumerate(zip(drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True)):
            sequence = turns[row][0]
            request = sequence.request
            if request.operation.request_id not in self._requests:
                continue  # A sibling in this batch has failed the request.
            if not sequence.pages:
                continue  # A row before has failed, and what was apart with it was interrupted: it is drawn again.
            if logprob != logprob:
                self._fail(request, Failure("the model's logits are not finite: its weights have diverged", "user"))
                continue
            wanted = request.operation.topk_sample_logprobs
            top = (top_ids[row, :wanted], top_values[row, :wanted]) if wanted else None
            sequence.append(token, logprob, raw_logprobs.get(row), top)
            if sequence.stop_reason is not None:
                self._batch.finish(sequence)
                if request.finished:
                    self._ended.append((request.operation.request_id, request.output()))
                    del self._requests[request.operation.request_id]
                    request.let_go()

    def _score_prompt(self, request: Request, start: int, hidden: Tensor) -> None:
        """Take the hidden states [n, H] of a prompt's positions start, start + 1, ... into its scores."""

        def logits_of(rows: Tensor) -> Tensor:
            return self._model.logits(rows, _segments([(request.sampler, len(rows))]))

        request.scores.take(start, hidden, logits_of, self._logit_rows)

    def _fail(self, request: Request, failure: Failure) -> None:
        self._batch.remove(request)
        self._quarantine.forget(request)
        del self._requests[request.operation.request_id]
        self._ended.append((request.operation.request_id, failure))
        request.let_go()


def _lora(turns: list[Turn]) -> LoraBatch:
    """The adapters of a step's rows."""
    return _segments((sequence.request.sampler, count) for sequence, count in turns)


def _segments(rows: Iterator[tuple[OpenedSampler, int]] | list[tuple[OpenedSampler, int]]) -> LoraBatch:
    """Runs of (sampler, rows) as segments, neighbours of one adapter merged; the base model's rows need none."""
    segments: list[Segment] = []
    start = 0
    for _, run in groupby(rows, key=lambda row: id(row[0].adapter)):
        samplers, counts = zip(*run, strict=True)
        end, adapter = start + sum(counts), samplers[0].adapter
        if adapter is not None:
            segments.append(Segment(adapter, start, end))
        start = end
    return SampledLora(segments)


def _cache_for(model: BaseModel, layers: Mapping[int, LayerShape], room: int, kv_cache_bytes: int) -> KVCache:
    """A cache of `room` bytes, what windows and states leave of `kv_cache_bytes`, but of at least one whole context, so
    that whatever the context allows also fits."""
    page_bytes = PAGE_TOKENS * sum(shape.numbers for shape in layers.values()) * model.dtype.itemsize
    pages = max(0, room // page_bytes - 1)  # and one of zeros
    least = pages_for(model.info.max_context)
    if pages < least:
        log.warning(
            "kv_cache_bytes = %d holds, beside %d bytes for decode windows and states, %d tokens of %s, less than one "
            "context of %d; taking %d bytes instead (a smaller max_context needs less)",
            kv_cache_bytes, kv_cache_bytes - room, pages * PAGE_TOKENS, model.info.name, model.info.max_context,
            kv_cache_bytes - room + (least + 1) * page_bytes,
        )  # fmt: skip
    return KVCache(layers, max(pages, least), model.dtype, model.device)
