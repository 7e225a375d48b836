"""What the fork server of `peak_memory` imports once: all that a child could need, so that no import is weighed."""

from __future__ import annotations

import contextlib
import importlib

import torch._inductor.compile_fx  # noqa: F401

from benchmarks.peers import PEERS

for peer in PEERS:
    for module in peer.modules:
        with contextlib.suppress(Exception):  # a peer that cannot be imported is not measured either
            importlib.import_module(module)
