"""What every engine process needs, imported once in the process that engines are forked from: it takes seconds and some
260 MB, which they share."""

from __future__ import annotations

import gc

import tinkercloud.engine.process
import tinkercloud.engine.torch.model
import tinkercloud.engine.torch.sampler
import tinkercloud.engine.torch.trainer  # noqa: F401

gc.freeze()  # a collection would write to pages that are shared
