"""Benchmarks: verify, then time, interleaved with peers. `pytest benchmarks/` runs them; README.md tells the rest."""
