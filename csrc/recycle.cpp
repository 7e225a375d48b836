// Fresh memory costs a page fault for every 4 KiB that is written, and pages of that size miss the TLB: together 10 to
// 15% of a step, whose buffers are freed and asked for again. So the last one of each purpose waits here for its next
// use, in huge pages where the system has them.
//
// What waits is the system's for the asking (MADV_FREE): under memory pressure it takes the pages, and the next use pays
// the faults again.

#include "recycle.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <map>
#include <mutex>
#include <utility>

#include <pthread.h>
#include <sys/mman.h>

namespace dpo_kernels {
namespace {

constexpr size_t kSmall = size_t{256} << 10;   // below it, the usual allocator has nothing to lose
constexpr size_t kPage = size_t{4} << 10;      // sizes are whole pages
constexpr size_t kHugePage = size_t{2} << 20;  // blocks begin at one

struct Block {
  void* data = nullptr;
  size_t size = 0;
};

// Null data if there is no memory.
Block map(size_t size) {
  void* got = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) return {};
  char* data = static_cast<char*>(got);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(data) % kHugePage) % kHugePage;
  if (before > 0) munmap(data, before);
  if (before < kHugePage) munmap(data + before + size, kHugePage - before);
#ifdef MADV_HUGEPAGE
  madvise(data + before, size, MADV_HUGEPAGE);
#endif
  return {data + before, size};
}

void unmap(Block block) {
  if (block.data != nullptr) munmap(block.data, block.size);
}

std::mutex& lock() {
  static std::mutex* const mutex = [] {
    // A child forked while another thread holds the lock would wait for it for ever.
    pthread_atfork([] { lock().lock(); }, [] { lock().unlock(); }, [] { lock().unlock(); });
    return new std::mutex;  // never destroyed: tensors may outlive every static
  }();
  return *mutex;
}

// The buffers of one purpose; at most one of them waits.
class Slot final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t wanted) override {
    if (wanted < kSmall) return c10::GetDefaultCPUAllocator()->allocate(wanted);
    const size_t size = (wanted + kPage - 1) / kPage * kPage;
    Block block = take(size);
    if (block.data == nullptr) {
      release_recycled();
      block = map(size);
    }
    TORCH_CHECK_WITH(
        OutOfMemoryError, block.data != nullptr, "not enough memory for ", size,
        " bytes: pass a smaller memory_budget, or fewer tokens at a time");
    auto* held = new Held{this, block};
    return {block.data, held, [](void* context) { give_back(static_cast<Held*>(context)); }, at::Device(at::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // The block that waits, which waits no longer.
  Block waiting() { return std::exchange(waiting_, {}); }

 private:
  struct Held {
    Slot* slot;
    Block block;
  };
  Block waiting_;

  Block take(size_t size) {
    const std::lock_guard<std::mutex> guard(lock());
    const Block block = waiting();
    if (block.size >= size) return block;
    unmap(block);
    return map(size);
  }

  static void give_back(Held* held) {
    const std::lock_guard<std::mutex> guard(lock());
    Block& waiting = held->slot->waiting_;
    if (held->block.size > waiting.size) std::swap(waiting, held->block);
    unmap(held->block);
#ifdef MADV_FREE
    madvise(waiting.data, waiting.size, MADV_FREE);
#endif
    delete held;
  }
};

std::map<std::string, Slot>& slots() {
  static auto* const all = new std::map<std::string, Slot>;
  return *all;
}

Slot& slot(const std::string& purpose) {
  const std::lock_guard<std::mutex> guard(lock());
  return slots()[purpose];
}

}  // namespace

at::Tensor recycled(const std::string& purpose, int64_t rows, int64_t columns, at::ScalarType dtype) {
  return at::detail::empty_generic(
      {rows, columns}, &slot(purpose), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

int64_t release_recycled() {
  const std::lock_guard<std::mutex> guard(lock());
  size_t bytes = 0;
  for (auto& [_, slot] : slots()) {
    const Block block = slot.waiting();
    bytes += block.size;
    unmap(block);
  }
  return static_cast<int64_t>(bytes);
}

}  // namespace dpo_kernels
