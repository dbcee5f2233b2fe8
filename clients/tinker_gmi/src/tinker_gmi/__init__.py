"""Extends the installed `tinker` SDK, when a program imports it, for servers other than the hosted one.

`tinker_gmi.pth` imports this at the start of every Python in the environment, so nothing here imports more than `sys`;
the extension itself, `tinker_gmi.extension`, is loaded by the first `import tinker`.
"""

import sys


class _AfterTinker:
    """A meta path finder that lets the others find `tinker` and runs the extension once it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != "tinker":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_extend(module):
                execute(module)
                _extend(module)

            spec.loader.exec_module = execute_and_extend
        return spec


def _extend(tinker):
    from tinker_gmi.extension import extend

    extend(tinker)


if "tinker" in sys.modules:
    _extend(sys.modules["tinker"])
else:
    sys.meta_path.insert(0, _AfterTinker())
