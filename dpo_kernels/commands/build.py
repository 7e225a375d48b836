"""`dpo-kernels build`: the C++ kernels for this machine, ahead of their first use."""

from __future__ import annotations

from dpo_kernels.commands.simple import Parser


def main(argv: list[str], program: str) -> int:
    """Builds and says where; 1 with the cause where it cannot."""
    Parser(program, "Builds the C++ kernels for this machine, or says that they are there.").parse_args(argv)
    from dpo_kernels import build

    return build.main()
