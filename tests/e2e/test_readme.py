"""What the README shows is run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_example_trains_and_samples(server):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    program = example.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *steps, text = done.stdout.splitlines()
    losses = [float(step.split()[1]) for step in steps]
    assert len(losses) == 30 and losses[-1] < losses[0] / 20
    assert " cheese" in text
