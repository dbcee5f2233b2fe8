"""Imports point down: api -> control -> ledger, scheduler -> engine; and only the engine knows torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinkercloud

ROOT = Path(tinkercloud.__file__).parent
ABOVE = {
    "engine": {"api", "cli", "control", "ledger", "scheduler", "server", "config", "model_settings"},
    "scheduler": {"api", "cli", "control", "ledger", "server"},
    "ledger": {"api", "cli", "control", "scheduler", "server"},
    "control": {"api", "cli", "server"},
    "api": {"cli", "server"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("room", ABOVE)
def test_no_room_imports_one_above_it(room):
    for file in (ROOT / room).rglob("*.py"):
        above = {name for name in imports(file) if name.split(".")[:1] == ["tinkercloud"] and len(name.split(".")) > 1}
        wrong = {name for name in above if name.split(".")[1] in ABOVE[room]}
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


def test_only_the_torch_engine_names_torch():
    for file in ROOT.rglob("*.py"):
        if (ROOT / "engine" / "torch") in file.parents or file == ROOT / "cli" / "doctor.py":
            continue  # the doctor asks torch which devices it sees; it serves nobody
        heavy = {name for name in imports(file) if name.split(".")[0] in ("torch", "transformers", "peft")}
        assert not heavy, f"{file.relative_to(ROOT)} imports {sorted(heavy)}"


def test_the_control_process_starts_without_torch():
    code = (
        "import tinkercloud.server, sys;"
        "loaded = [m for m in ('torch', 'transformers') if sys.modules.get(m) is not None];"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
