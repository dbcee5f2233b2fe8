"""How many tokens of which kind an operation has cost, as the SDK's billing events tell them apart."""

from __future__ import annotations

from tinkercloud.engine.results import LossOutput, Result, SampleOutput
from tinkercloud.ledger.records import Entry, UsageKind


def tokens_of(entry: Entry, result: Result) -> dict[UsageKind, int]:
    """Of an operation that has ended so; nothing for a failure, and for what computes over no tokens.

    A forward pass alone counts as training (SDK `TrainingBillingEvent`). The prompt of a sample counts once, however
    many continuations it has; those of its tokens that were remembered are "cached" and not "prefill".
    """
    match result:
        case LossOutput():
            return {"train": entry.num_tokens}
        case SampleOutput():
            cached = min(result.prompt_cache_hit_tokens, entry.num_tokens)
            sampled = sum(len(sequence.tokens) for sequence in result.sequences)
            return {"prefill": entry.num_tokens - cached, "cached": cached, "sample": sampled}
        case _:
            return {}
