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


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, str]]:
    """What each rank says of each check; the error, or nothing."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder),
    }  # fmt: skip
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
