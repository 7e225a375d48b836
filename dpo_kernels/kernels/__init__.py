"""The Triton kernels. All but `configs` and `launch` import triton; `launch.py` imports them when needed."""
