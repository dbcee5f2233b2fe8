"""Client programs, run to their end by the Python of an environment that `make test` builds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]

LIMIT_SECONDS = 300
"""How long a program may take before it counts as hanging."""


def run_python(
    environment: str, *arguments: str, cwd: Path, input: str = "", **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` of an environment, such as `.venv-clients`, in the folder `cwd`; what it printed.

    It sees none of this process's own settings for the SDK, the hub or Python, only those given as keywords.
    """
    python = ROOT / environment / "bin" / "python"
    assert python.exists(), f"there is no {python}; `make test` builds the environments before it runs the tests"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TINKER", "HF_", "PYTHON"))}
    quiet = {"TINKER_TELEMETRY": "0", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(python), *arguments],
        check=False,
        capture_output=True,
        input=input,
        text=True,
        timeout=LIMIT_SECONDS,
        cwd=cwd,
        env=kept | quiet | {"HOME": str(cwd)} | environ,
    )
