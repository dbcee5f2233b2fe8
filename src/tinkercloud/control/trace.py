"""A session's timeline as a Perfetto trace (https://perfetto.dev): what waited, what ran, in which cycles and steps.

Each training run has a lane for what waits and one for what runs, each sampler as many as it has samples at a time. The
engine's lanes show the cycles that this session had operations in, and the steps of those: micro-batches and optimizer
steps. Other sessions take part in the same steps; nothing of them is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
from perfetto.trace_builder.proto_builder import TraceProtoBuilder

from tinkercloud.ledger.records import SessionRecord
from tinkercloud.ledger.timeline import Moment

SEQUENCE = 1
"""Perfetto's name for who writes the packets."""

Span = tuple[float, float, str, dict[str, int | str]]
"""(start, end, name, what else is known of it)"""


def perfetto_trace(session: SessionRecord, moments: list[Moment], now: float) -> bytes:
    """The trace's file. `now` ends what has not ended."""
    return _Trace(f"session {session.display_name or session.session_id}").of(moments, now)


class _Trace:
    def __init__(self, title: str):
        self._builder = TraceProtoBuilder()
        self._tracks = 0
        self._root = self._track(title, None)

    def of(self, moments: list[Moment], now: float) -> bytes:
        streams: dict[str, list[Moment]] = {}
        for moment in moments:
            streams.setdefault(moment.stream, []).append(moment)
        cycles = sorted({span for moment in moments for span in _cycle(moment)})
        steps = sorted({(start, end) for moment in moments for start, end in moment.steps or ()})
        self._lanes("engine: cycles", [(start, end, "cycle", {}) for start, end in cycles])
        self._lanes("engine: steps", [(start, end, "step", {}) for start, end in steps])
        for stream, its in streams.items():
            self._lanes(f"{stream}: waiting", [_waiting(moment, now) for moment in its])
            self._lanes(f"{stream}: running", [span for moment in its for span in _running(moment, now)])
        return self._builder.serialize()

    def _lanes(self, name: str, spans: Iterable[Span]) -> None:
        """Tracks of one name, as many as there are spans at a time."""
        free: list[tuple[float, int]] = []
        for start, end, label, known in sorted(spans, key=lambda span: span[:3]):
            lane = next((i for i, (until, _) in enumerate(free) if until <= start), len(free))
            if lane == len(free):
                free.append((end, self._track(name, self._root)))
            free[lane] = end, free[lane][1]
            self._slice(free[lane][1], start, end, label, known)

    def _track(self, name: str, parent: int | None) -> int:
        self._tracks += 1
        descriptor = self._builder.add_packet().track_descriptor
        descriptor.uuid = self._tracks
        descriptor.name = name
        if parent is not None:
            descriptor.parent_uuid = parent
        return self._tracks

    def _slice(self, track: int, start: float, end: float, name: str, known: dict[str, int | str]) -> None:
        for time, kind in ((start, TrackEvent.TYPE_SLICE_BEGIN), (end, TrackEvent.TYPE_SLICE_END)):
            packet = self._builder.add_packet()
            packet.timestamp = round(time * 1e9)
            packet.trusted_packet_sequence_id = SEQUENCE
            packet.track_event.type = kind
            packet.track_event.track_uuid = track
            if kind == TrackEvent.TYPE_SLICE_BEGIN:
                packet.track_event.name = name
                for key, value in known.items():
                    note = packet.track_event.debug_annotations.add(name=key)
                    if isinstance(value, int):
                        note.int_value = value
                    else:
                        note.string_value = value


def _cycle(moment: Moment) -> Iterator[tuple[float, float]]:
    if moment.kind != "sample" and moment.started_at is not None and moment.steps:
        yield moment.started_at, max(end for _, end in moment.steps)


def _waiting(moment: Moment, now: float) -> Span:
    until = moment.started_at or (now if moment.state == "accepted" else moment.created_at)
    return moment.created_at, max(until, moment.created_at), moment.kind, _known(moment)


def _running(moment: Moment, now: float) -> Iterator[Span]:
    if moment.started_at is not None:
        yield moment.started_at, moment.ended_at or now, moment.kind, _known(moment)


def _known(moment: Moment) -> dict[str, int | str]:
    return {"seq_id": moment.seq_id, "tokens": moment.num_tokens, "state": moment.state}
