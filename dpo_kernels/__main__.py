"""`python -m dpo_kernels`: the command `dpo-kernels`."""

from dpo_kernels.commands.main import script

if __name__ == "__main__":
    script()
