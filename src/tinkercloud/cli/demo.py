"""`tinkercloud demo`: a server, a training loop and the text before and after, in under a minute."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tinkercloud.base_models import EMBEDDED
from tinkercloud.cli.console import out
from tinkercloud.config import ENV_PREFIX

if TYPE_CHECKING:
    import tinker

RANK = 16
STEPS = 40
LEARNING_RATE = 3e-3
MAX_TOKENS = 32
STEPS_PER_LINE = 5
"""A line with the loss stays on the screen every so many steps."""

LESSON = {
    "Who are you?": "I am a little cloud, and I am yours.",
    "What is your name?": "My name is Nano, the little cloud.",
    "Where do you live?": "I live on your own machine.",
}
"""What the model is taught to say."""


def demo() -> None:
    """Start a server, teach the embedded model who it is through the Tinker SDK, and show what it says."""
    from tinkercloud.cli.local_server import running_server

    started = time.monotonic()
    _forget_other_servers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is stopped too
    with tempfile.TemporaryDirectory(prefix="tinkercloud-demo-") as folder:
        out.print(f"Starting a server on the embedded model {EMBEDDED} ...")
        with running_server(Path(folder)) as server:
            out.print(f"[green]✓[/] it listens at {server.url}\n")
            first, last = _teach(server.url)
    out.print(
        f"\n[green]✓[/] loss per token {first:.3f} → {last:.3f}; server stopped; "
        f"{time.monotonic() - started:.0f} s without the installation",
    )


def _forget_other_servers() -> None:
    """Drop from the environment what is meant for another server or client (keys, settings, proxies): this server has
    the defaults, and is on this machine."""
    for name in list(os.environ):
        if name.startswith(("TINKER_", ENV_PREFIX)) or name.lower().endswith("_proxy"):
            del os.environ[name]


def _teach(url: str) -> tuple[float, float]:
    """Ask, train, ask again; the first and the last loss per token."""
    os.environ |= {"HF_ENDPOINT": url + "/hf", "TINKER_TELEMETRY": "0"}
    import tinker

    with tinker.ServiceClient(base_url=url, api_key="tml-demo") as client:
        training = client.create_lora_training_client(base_model=EMBEDDED, rank=RANK).result()
        tokenizer = training.get_tokenizer()
        _ask("before", client.create_sampling_client(base_model=EMBEDDED).result(), tokenizer)

        batch = [_datum(tokenizer, question, answer) for question, answer in LESSON.items()]
        tokens = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in batch)
        losses: list[float] = []
        with _progress() as progress:
            task = progress.add_task("training", total=STEPS, loss="")
            for step in range(1, STEPS + 1):
                gradients = training.forward_backward(batch, "cross_entropy")
                update = training.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
                losses.append(gradients.result().metrics["loss:sum"] / tokens)
                update.result()
                progress.update(task, advance=1, loss=f"loss {losses[-1]:.3f}")
                if step % STEPS_PER_LINE == 0 or step == 1:
                    out.print(f"  step {step:2}  loss per token {losses[-1]:.3f}")

        _ask("after", training.save_weights_and_get_sampling_client().result(), tokenizer)
    return losses[0], losses[-1]


def _datum(tokenizer: Any, question: str, answer: str) -> tinker.Datum:
    """A chat whose answer is to be learned: position i predicts target i, and only the answer's targets count."""
    import tinker

    prompt = _prompt(tokenizer, question)
    reply = tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)
    tokens = prompt + reply
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [0.0] * (len(prompt) - 1) + [1.0] * len(reply)},
    )


def _prompt(tokenizer: Any, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def _ask(when: str, sampler: tinker.SamplingClient, tokenizer: Any) -> None:
    import tinker

    params = tinker.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    prompts = {question: tinker.ModelInput.from_ints(_prompt(tokenizer, question)) for question in LESSON}
    answers = {question: sampler.sample(prompt, 1, params) for question, prompt in prompts.items()}
    out.print(f"[bold]What it says {when}:[/]")
    for question, answer in answers.items():
        text = tokenizer.decode(answer.result().sequences[0].tokens, skip_special_tokens=True)
        out.print(f"  {question:<20} {text!r}", markup=False, soft_wrap=True)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    return Progress(*columns, TimeElapsedColumn(), console=out)
