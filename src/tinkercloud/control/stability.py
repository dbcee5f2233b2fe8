"""What was recorded when tokens were sampled, for losses that need it: found by sequence id, and joined to the datums
whose spans name it.

There is no store of its own: a sample's entry in the ledger has the prompt in its payload, tokens and log-probabilities
in its outcome, and both are kept for as long as the record is to last. A datum is joined when its batch is accepted: so
the logged operation is complete, and a replay gives the same bits when the record has long expired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from msgspec import Struct

from tinkercloud.codec import decode
from tinkercloud.engine.operations import Datum, Sample
from tinkercloud.engine.results import Result, SampledSequence, SampleOutput
from tinkercloud.errors import InvalidRequest
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import ModelRecord, SamplerRecord

TARGETS = "target_tokens"


class Span(Struct, frozen=True):
    """A run of a datum's tokens and where it came from (SDK `types.PromptProvenanceSpan`, `SampledProvenanceSpan`)."""

    sequence_id: str
    offset: int
    """The run's first position, in the tokens of the sequence or in the prompt that it was drawn from."""
    length: int
    sampled: bool
    """Whether the run is of the sequence itself; else of its prompt."""


class Provenance(Struct, frozen=True):
    """Where a datum's tokens came from: spans that tile its input, and spans that tile its targets."""

    model_input: tuple[Span, ...]
    targets: tuple[Span, ...]

    @property
    def sequence_ids(self) -> set[str]:
        return {span.sequence_id for span in (*self.model_input, *self.targets) if span.length}


class SequenceRecord(Struct, frozen=True):
    """What is known of a sampled sequence."""

    prompt: np.ndarray
    """int32"""
    sequence: SampledSequence


Records = Mapping[str, SequenceRecord]
"""By sequence id."""


def sequence_id(request_id: str, number: int) -> str:
    """The id of one of a sample's sequences; what `StabilityRecords.recall` finds it by."""
    return f"{request_id}:{number}"


def is_recorded(result: Result) -> bool:
    """Whether this is the outcome of a sample that asked for a record."""
    return isinstance(result, SampleOutput) and result.sequences[0].policy_logprobs is not None


class StabilityRecords:
    """The records of all sessions."""

    def __init__(self, ledger: Ledger, retention: float) -> None:
        """`retention`: seconds for which a record is kept after it was made, and again after each use."""
        self._ledger = ledger
        self._retention = retention

    async def recall(self, model: ModelRecord, sequence_ids: Iterable[str]) -> dict[str, SequenceRecord]:
        """The records that a batch of this training run names; their retention begins anew.

        InvalidRequest names a sequence that the training run's session has not, or that has no record (any more).
        """
        requests: dict[str, list[str]] = {}
        for name in sorted(sequence_ids):
            requests.setdefault(name.rpartition(":")[0], []).append(name)
        for request_id, names in requests.items():
            await self._check(model, request_id, names[0])
        kept = await self._ledger.keep(list(requests), self._retention)
        found: dict[str, SequenceRecord] = {}
        for request_id, names in requests.items():
            stored = await self._ledger.outcome(request_id) if request_id in kept else None
            if stored is None:
                raise InvalidRequest(
                    f"sequence {names[0]} has no stability record: it was sampled without record_stability_info=True, "
                    f"or not trained on for {self._retention:g} s, after which records expire; sample again"
                )
            prompt = decode(await self._ledger.payload(request_id), Sample).prompt
            sequences = decode(stored, SampleOutput).sequences
            numbers = {sequence_id(request_id, number): number for number in range(len(sequences))}
            for name in names:
                if name not in numbers:
                    raise _unknown(name)
                found[name] = SequenceRecord(prompt, sequences[numbers[name]])
        return found

    async def _check(self, model: ModelRecord, request_id: str, name: str) -> None:
        """It is a sample of the training run's session."""
        entry = await self._ledger.entry(request_id)
        sampler = await self._ledger.get(SamplerRecord, entry.stream) if entry is not None else None
        if sampler is None or (sampler.owner, sampler.session_id) != (model.owner, model.session_id):
            raise _unknown(name)


def _unknown(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"there is no sequence {name!r:.200} in this training run's session; spans name the sequence_id of samples "
        "that were drawn in the same session"
    )


def joined(datum: Datum, provenance: Provenance | None, records: Records) -> Datum:
    """The datum, of target_tokens and advantages, with what was recorded of its targets: logprobs, policy_logprobs and
    sampled, float32 [N], 0 where its spans say that a target was prompt.

    InvalidRequest if the spans do not fit the datum or the records.
    """
    if provenance is None:
        raise InvalidRequest("no spans say which sampled sequences its tokens are of; use Datum.with_provenance")
    targets, advantages = datum.inputs[TARGETS], datum.inputs["advantages"]
    for name, values in ((TARGETS, targets), ("advantages", advantages)):
        if values.ndim != 1 or len(values) != len(targets):
            raise InvalidRequest(f"{name} must have the shape [{len(targets)}], not {list(values.shape)}")
    _check_tiles("model_input", datum.tokens, provenance.model_input, records)
    _check_tiles(TARGETS, targets, provenance.targets, records)
    recorded = {name: np.zeros(len(targets), np.float32) for name in ("logprobs", "policy_logprobs", "sampled")}
    start = 0
    for span in provenance.targets:
        if span.sampled and span.length:
            place, run = slice(start, start + span.length), slice(span.offset, span.offset + span.length)
            sequence = records[span.sequence_id].sequence
            drawing = sequence.logprobs if sequence.drawing_logprobs is None else sequence.drawing_logprobs
            recorded["logprobs"][place] = drawing[run]
            recorded["policy_logprobs"][place] = sequence.policy_logprobs[run]
            recorded["sampled"][place] = 1
        start += span.length
    wrong = np.flatnonzero((advantages != 0) & (recorded["sampled"] == 0))
    if len(wrong):
        raise InvalidRequest(
            f"advantages has {advantages[wrong[0]]:g} at position {wrong[0]}, where the spans of {TARGETS} say prompt; "
            "only sampled tokens can be reinforced, send 0 for others"
        )
    return Datum(tokens=datum.tokens, inputs={**datum.inputs, **recorded})


def _check_tiles(field: str, tokens: np.ndarray, spans: Sequence[Span], records: Records) -> None:
    """The spans tile the tokens, and each holds the tokens that its sequence or prompt has there."""
    for span in spans:
        if span.offset < 0 or span.length < 0:
            raise InvalidRequest(
                f"a span of {field} has offset {span.offset} and length {span.length}; neither can be negative"
            )
    covered = sum(span.length for span in spans)
    if covered != len(tokens):
        raise InvalidRequest(f"the spans of {field} cover {covered} positions; they must tile all {len(tokens)}")
    start = 0
    for span in spans:
        if not span.length:
            continue
        record = records[span.sequence_id]
        known, what = (record.sequence.tokens, "sequence") if span.sampled else (record.prompt, "the prompt of")
        end = span.offset + span.length
        if end > len(known):
            raise InvalidRequest(
                f"a span of {field} takes tokens {span.offset} to {end - 1} of {what} {span.sequence_id}, which has "
                f"{len(known)}"
            )
        wrong = np.flatnonzero(tokens[start : start + span.length] != known[span.offset : end])
        if len(wrong):
            first = int(wrong[0])
            raise InvalidRequest(
                f"{field} has token {tokens[start + first]} at position {start + first}, where {what} "
                f"{span.sequence_id} has {known[span.offset + first]}"
            )
        start += span.length
