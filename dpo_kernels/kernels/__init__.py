"""The Triton kernels. All but `tables` import triton; `dpo_kernels.impls.triton_impl` imports them when needed."""
