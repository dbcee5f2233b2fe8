"""The measurements, in the order in which they run and are shown."""

from bench.measurements.acknowledged import ACKNOWLEDGED
from bench.measurements.forward_backward import FORWARD_BACKWARD
from bench.measurements.latency import LATENCY
from bench.measurements.many_samples import MANY_SAMPLES
from bench.measurements.memory import MEMORY
from bench.measurements.peak_memory import PEAK_MEMORY
from bench.measurements.round_trip import ROUND_TRIP
from bench.measurements.sampling import AGAINST_VLLM, SAMPLING
from bench.measurements.shared_prompt import SHARED_PROMPT
from bench.measurements.short_beside_long import SHORT_BESIDE_LONG
from bench.measurements.side_by_side import SIDE_BY_SIDE
from bench.measurements.start import START
from bench.measurements.tenants import TENANTS

__all__ = ["AGAINST_VLLM", "ALL"]

ALL = (
    *FORWARD_BACKWARD,
    *TENANTS,
    *PEAK_MEMORY,
    ROUND_TRIP,
    *SAMPLING,
    *SHARED_PROMPT,
    *LATENCY,
    *SHORT_BESIDE_LONG,
    *MANY_SAMPLES,
    *SIDE_BY_SIDE,
    START,
    MEMORY,
    ACKNOWLEDGED,
)
