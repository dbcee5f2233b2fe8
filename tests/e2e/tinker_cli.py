"""Run in the official clients' environment: commands of the `tinker` CLI, one after another in one process.

The commands come as a JSON list of argument lists on stdin; what each said goes to stdout as one JSON line. What they
ask for is answered with the variable TYPED.
"""

import json
import os
import sys

from click.testing import CliRunner
from tinker.cli.__main__ import main_cli

for arguments in json.load(sys.stdin):
    result = CliRunner().invoke(main_cli, arguments, input=os.environ.get("TYPED"))
    error = None if result.exception is None else f"{result.exception}: {getattr(result.exception, 'details', '')}"
    print(json.dumps({"output": result.stdout, "error": error}), flush=True)
