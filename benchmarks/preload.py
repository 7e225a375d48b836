"""What the fork server of `memory` imports once: all that a child could need, so that no import is measured."""

from __future__ import annotations

import importlib

import torch
import torch._inductor.compile_fx

from benchmarks.peers import PEERS

for peer in PEERS:
    if peer.modules and peer.unavailable(torch.device("cpu")) is None:
        for module in peer.modules:
            importlib.import_module(module)
