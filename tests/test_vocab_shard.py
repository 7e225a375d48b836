"""A vocabulary over two ranks: each contract of tests/vocab_checks.py, in one pair of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import vocab_checks
from helpers import ROOT

from dpo_kernels.collectives import _ends
from dpo_kernels.vocab_shard import chunk


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, str]]:
    """What each rank says of each check; the error, or nothing."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    code = (
        "import vocab_checks, vocab_parallel\n"
        "if __name__ == '__main__':\n"
        f"    vocab_parallel.spawn(2, vocab_checks.run_checks, {str(folder)!r})\n"
    )
    script = folder / "ranks.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    said = [Path(folder, f"{rank}.json") for rank in range(2)]
    assert all(file.exists() for file in said), done.stderr
    return [json.loads(file.read_text(encoding="utf-8")) for file in said]


@pytest.mark.parametrize("name", vocab_checks.CHECKS)
def test_two_ranks(found, name):
    for rank, of_rank in enumerate(found):
        if name not in of_rank:
            failed = [other for other, error in of_rank.items() if error]
            pytest.fail(f"not reached on rank {rank}: {failed or 'another rank'} failed before")
        assert not of_rank[name], f"rank {rank}: {of_rank[name]}"


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_parts_that_overlap_or_leave_rows_out_are_found(ranks):
    """Also the usual slip: parts as torch.chunk cuts them, that begin as if all were equally long."""
    for vocab_size in range(1000, 1400):
        parts = [chunk(vocab_size, ranks, rank) for rank in range(ranks)]
        whole = _ends(0, vocab_size)
        assert _total(_ends(part.start, part.stop) for part in parts) == whole
        slipped = [(rank * (vocab_size // ranks), part.stop - part.start) for rank, part in enumerate(parts)]
        if any(first != part.start for (first, _), part in zip(slipped, parts, strict=True)):
            assert _total(_ends(first, first + rows) for first, rows in slipped) != whole, vocab_size


def _total(parts):
    return [sum(numbers) for numbers in zip(*parts, strict=True)]
