"""A Hugging Face home that needs no network: the embedded model under hub names, and generated data sets."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

from tinkercloud import nano

MODELS = ("Qwen/Qwen3-8B", "Qwen/Qwen2.5-0.5B-Instruct")
"""What the recipes and the quickstart ask for."""

ANIMALS = ("otter", "heron", "badger", "lizard", "walrus", "beetle", "falcon", "donkey")
TREATS = ("plums", "rice", "honey", "corn", "figs", "nuts", "kelp", "toast")


def fill_cache(hf_home: Path) -> None:
    """The embedded model as a download of each of `MODELS`, in the layout of the hub's own cache."""
    for name in MODELS:
        revision = hashlib.sha1(name.encode()).hexdigest()
        repository = hf_home / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(nano.FOLDER, repository / "snapshots" / revision, ignore=shutil.ignore_patterns("*.py", "__*"))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversations(count: int, seed: int) -> list[dict]:
    """Chats about what no model was taught: which treat each animal likes."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        for animal in draw.sample(ANIMALS, 2):
            treat = TREATS[ANIMALS.index(animal)]
            messages.append({"role": "user", "content": f"What does the {animal} like?"})
            messages.append({"role": "assistant", "content": f"The {animal} likes {treat}, and nothing else."})
        rows.append({"messages": messages})
    return rows


def comparisons(count: int, seed: int) -> list[dict]:
    """Pairs of answers to one question, of which the polite one is chosen."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        animal, treat = draw.choice(ANIMALS), draw.choice(TREATS)
        asked = f"\n\nHuman: Does the {animal} like {treat}?\n\nAssistant: "
        rows.append({"chosen": f"{asked}Yes, it likes {treat} very much.", "rejected": f"{asked}No idea. Go away."})
    return rows


def write_data(folder: Path) -> None:
    """The data sets, where `datasets.load_dataset` looks for them first: below the working directory."""
    write_lines(folder / "conversations.jsonl", conversations(64, seed=0))
    for split, count, seed in (("train", 96, 1), ("test", 8, 2)):
        write_lines(folder / "HuggingFaceH4" / "no_robots" / f"{split}.jsonl", conversations(count, seed))
        write_lines(folder / "Anthropic" / "hh-rlhf" / f"{split}.jsonl", comparisons(count, seed))
