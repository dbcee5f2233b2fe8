"""How fast gradients of a batch are that fills the machine."""

from __future__ import annotations

from bench.measurement import Measurement
from bench.readings import Goal, Readings
from bench.stage import Stage, batch, seconds

ROWS, TOKENS = 8, 256
NAME, WORK = "forward_backward", {"rows": ROWS, "tokens": TOKENS}


def take(stage: Stage, repeat: int) -> Readings:
    """Seconds of one forward_backward."""
    data = batch(ROWS, TOKENS)

    def gradients() -> float:
        return seconds(lambda: stage.training.forward_backward(data, "cross_entropy").result())

    return stage.by_hand.compared(gradients, NAME, WORK, repeat)


FORWARD_BACKWARD = Measurement(
    "forward_backward",
    f"forward_backward of {ROWS} x {TOKENS} tokens",
    "PEFT",
    Goal("speed", 0.95),
    take,
    task=(NAME, WORK),
)
