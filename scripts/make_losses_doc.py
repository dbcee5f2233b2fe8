"""Writes docs/losses.md from the registry and its formulas: python scripts/make_losses_doc.py"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

from tinkercloud.engine import custom_operations as names
from tinkercloud.engine.custom_loss import MAX_NODES
from tinkercloud.engine.losses import LOSSES, Loss
from tinkercloud.engine.torch.custom_loss import MAX_ELEMENTS, MAX_RESULTS, MAX_WORK
from tinkercloud.engine.torch.losses import LOG_RATIO_LIMIT, LOSS_FUNCTIONS

PAGE = Path(__file__).parent.parent / "docs" / "losses.md"


def _names(listed: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in sorted(listed))


INTRODUCTION = f"""\
# Losses

*Made from `src/tinkercloud/engine/losses.py` and the formulas in `src/tinkercloud/engine/torch/losses.py` by
`scripts/make_losses_doc.py`.*

```python
training_client.forward_backward(data, "ppo", loss_fn_config={{"clip_high_threshold": 1.28, "entropy": 1}})
```

Position i of a datum's `model_input` predicts entry i of its `target_tokens`. Every loss is a sum over all targets,
never a mean, and gradients add up until `optim_step`. All inputs are required, of the shape of `target_tokens`: [N], or
[N, K] for K weighted targets a position where a loss says so; only what comes from a record of sampling is not to be
sent ([stable_reinforce](#stable_reinforce)). A 2-D `torch` tensor of targets or weights travels sparsely when that is
shorter; entries that it leaves out are target 0 of weight 0. An input or a key of `loss_fn_config` that a loss does not
have is refused by name. The page on sampling has a whole [loop](sampling.md#reinforcement-learning).

In the formulas lp is the current log-probability of a target, q the sampler's (`logprobs`), A the advantage,
r = exp(lp - q) their probability ratio, sg(x) is x without its gradient. A log-ratio above {LOG_RATIO_LIMIT:g} counts
as {LOG_RATIO_LIMIT:g} and has no gradient, so that one impossible token leaves the loss and the optimizer's moments
finite.

## What comes back

Per datum, in the shape of its targets: `logprobs`, the current log-probabilities, and `elementwise_loss`, the terms of
the sum. The metrics:

| Metric | Meaning |
|---|---|
| `loss:sum` | the loss |
| `tokens:sum` | tokens of the model inputs |
| `active_tokens:sum` | positions that count: see each loss |
| `ratio:mean` | r, or what the loss has in its place; with `logprobs` only |
| `clip_fraction:mean` | positions that a bound took effect on; where there are bounds |
| `kl_sample_train_v1:mean` | q - lp, an estimate of the KL divergence of the current policy from the sampler's, nats |
| `kl_sample_train_v2:mean` | (q - lp)^2 / 2, another with less variance |
| `kl_sample_train_v3:mean` | u * k of `stable_reinforce`, of the KL divergence the other way round, nats |
| `entropy:mean` | entropy of the current distribution, nats; with `entropy` = 1 in `loss_fn_config` |

A mean is the mean over datums of each datum's mean over the positions that count; a datum without any adds 0, or 1 to
the ratio. The client weights the means of a batch's chunks with their datums, so that the numbers do not depend on how
it was cut.
"""


RECORDS = """\
### The record of sampling

```python
sampler = training_client.save_weights_and_get_sampling_client(record_stability_info=True).result()
sequence = sampler.sample(prompt, 1, params).result().sequences[0]
tokens = prompt.to_ints() + sequence.tokens
silent = prompt.length - 1
datum = types.Datum(
    model_input=types.ModelInput.from_ints(tokens[:-1]),
    loss_fn_inputs={
        "target_tokens": np.array(tokens[1:]),
        "advantages": np.array([0.0] * silent + [advantage] * len(sequence.tokens), np.float32),
    },
).with_provenance(
    model_input=[
        types.PromptProvenanceSpan(sequence_id=sequence.sequence_id, length=prompt.length),
        types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=len(sequence.tokens) - 1),
    ],
    loss_fn_inputs=[
        types.PromptProvenanceSpan(sequence_id=sequence.sequence_id, offset=1, length=silent),
        types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=len(sequence.tokens)),
    ],
)
training_client.forward_backward([datum], "stable_reinforce", loss_fn_config={"kl_coeff": 0.02}).result()
```

A sample with `record_stability_info` leaves a record on the server, of its prompt, its tokens, and q and p of each. A
batch is joined with the records that its spans name when it is accepted; from then on it does not need them. Its spans
must tile `model_input` and `target_tokens` exactly, the tokens must be those of the prompts and sequences that they
name, and advantages at prompt positions must be 0; else the batch is refused, with the position. Spans may name any
number of sequences, such as the turns of a conversation.

A record belongs to the session that sampled it: no other session, and nobody else, can train on it. It is kept for
`stability_retention_seconds` (a day), which each batch that names it begins anew, over restarts of the server too.
Other losses take datums with spans and do not read them.
"""


CUSTOM = f"""\
## custom

A function of your own, run on the server in one forward_backward:

```python
def loss(logprobs, advantages):
    value = -(logprobs.exp() * advantages).sum()
    return value, {{"custom/surprise:mean": -logprobs.mean()}}


handle = service_client.create_custom_loss(loss, input_ranks={{"logprobs": 1, "advantages": 1}}).result()
training_client.forward_backward_custom(data, handle).result()
```

The SDK traces it with `torch.fx` and sends the graph, which is data: the server runs what it has a function of its own
for and refuses all else by name. It runs once per datum; the losses are added up, metrics added up or averaged over the
datums as their names end. The records are of type `CustomLossReturn` and have `logprobs` only. What the loss does not
read of `loss_fn_inputs` is left out. A graph has at most {MAX_NODES} nodes; one result at most {MAX_ELEMENTS:,}
elements, all of a datum {MAX_RESULTS:,}; a request may read and write {MAX_WORK:,} elements.

A function that is not traced, `forward_backward_custom(data, f)`, runs on the client, as does every custom loss if the
server's `custom_loss_server_side` is off: in a forward and a backward pass, with any Python in between.

| May be called | |
|---|---|
| `torch.` | {_names(names.TORCH)} |
| `torch.nn.functional.` | {_names(names.FUNCTIONAL)} |
| methods of tensors | {_names(names.METHODS)} |
| attributes of tensors | {_names(names.ATTRIBUTES)} |
| `operator.` (arithmetic, comparison, indexing) | {_names(names.OPERATORS)} |
| `math.`, on numbers | {_names(names.MATH)} |
"""


ORIGINS = {"client": "", "record": "; from the record", "either": "; from the record, whatever is sent"}
"""What a table says of where an input comes from."""


def page() -> str:
    """The whole page, as docs/losses.md must be."""
    return "\n".join([INTRODUCTION, *(line for loss in LOSSES.values() for line in _section(loss)), CUSTOM])


def _section(loss: Loss) -> list[str]:
    formula, _, text = (inspect.getdoc(LOSS_FUNCTIONS[loss.name]) or "").partition("\n")
    shape = "[N] or [N, K]" if loss.several_targets else "[N]"
    return [
        f"## {loss.name}",
        "",
        f"    {formula}",
        "",
        text.strip(),
        "",
        f"`loss_fn_inputs`, {shape}:",
        "",
        "| Input | dtype | Meaning |",
        "|---|---|---|",
        *(f"| `{wanted.name}` | {wanted.dtype} | {wanted.meaning}{ORIGINS[wanted.origin]} |" for wanted in loss.inputs),
        "",
        "| `loss_fn_config` | Default | Meaning |",
        "|---|---|---|",
        *(f"| `{key.name}` | {key.default:g} | {key.meaning} |" for key in loss.config),
        "",
        f"A position counts where `{loss.counts}` is not 0. The records are of type `{loss.output_type}`.",
        "",
        *([RECORDS] if loss.needs_records else []),
    ]


if __name__ == "__main__":
    PAGE.write_text(page())
