"""What the README and the page on sampling show is run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(page: str, server, *changes: tuple[str, str]) -> list[str]:
    """The lines that a page's one program prints."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    for old, new in (("http://127.0.0.1:8000", server.url), *changes):
        assert old in program
        program = program.replace(old, new)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_example_trains_and_samples(server):
    *steps, text = run("README.md", server)
    losses = [float(step.split()[1]) for step in steps]
    assert len(losses) == 30 and losses[-1] < losses[0] / 20
    assert " cheese" in text


def test_the_reinforcement_learning_raises_its_reward(server):
    steps = [line.split() for line in run("docs/sampling.md", server, ("range(10)", "range(4)"))]
    assert float(steps[-1][1]) > float(steps[0][1])
    assert all(abs(float(ratio) - 1) < 1e-5 for _, _, ratio in steps)
