// Memory for the large buffers that every step asks for again.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace dpo_kernels {

// An uninitialised (rows, columns), in memory of a buffer of the same purpose that nobody holds any more, if one waits:
// writing it costs no page faults. It is freed, resized and shared like any tensor.
at::Tensor recycled(const std::string& purpose, int64_t rows, int64_t columns, at::ScalarType dtype);

// Gives the memory that waits for its next use back to the system; returns its bytes.
int64_t release_recycled();

}  // namespace dpo_kernels
