// Fresh memory costs a page fault for every 4 KiB that is written, and small pages miss the TLB: together 7 to 15% of a
// step, whose buffers are freed and asked for again. So one buffer of each purpose, the larger where two come back, waits
// here for its next use, in huge pages where the system has them.
//
// What waits is the system's for the asking (MADV_FREE): under memory pressure it takes the pages, and the next use pays
// the faults again. Where it cannot be lent so, nothing waits.

#include "recycle.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

namespace dpo_kernels {
namespace {

constexpr size_t kSmall = size_t{256} << 10;   // below it, the usual allocator has nothing to lose
constexpr size_t kHugePage = size_t{2} << 20;  // blocks begin at one
constexpr size_t kMuchSmaller = 4;             // times: a buffer so much smaller cuts the block that waited

// AddressSanitizer watches the usual allocator's memory alone.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kWatched = true;
#else
constexpr bool kWatched = false;
#endif

struct Block {
  void* data = nullptr;
  size_t size = 0;
};

size_t whole_pages(size_t size) {
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (size + page - 1) / page * page;
}

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

bool lend_to_system(Block block) {
#ifdef MADV_FREE
  return madvise(block.data, block.size, MADV_FREE) == 0;
#else
  return false;
#endif
}

// The allocator of one purpose.
class Allocator final : public at::Allocator {
 public:
  explicit Allocator(std::string purpose) : purpose_(std::move(purpose)) {}
  at::DataPtr allocate(size_t wanted) override;
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  std::string purpose_;
};

class Recycler {
 public:
  static Recycler& instance() {
    static Recycler* const recycler = [] {
      // A child forked while another thread holds the lock would wait for it for ever.
      pthread_atfork(
          [] { instance().lock_.lock(); }, [] { instance().lock_.unlock(); }, [] { instance().lock_.unlock(); });
      return new Recycler;  // never destroyed: tensors may outlive every static
    }();
    return *recycler;
  }

  // Storages point to it: it stays where it is.
  Allocator& allocator(const std::string& purpose) {
    const std::lock_guard<std::mutex> guard(lock_);
    return allocators_.try_emplace(purpose, purpose).first->second;
  }

  void* take(const std::string& purpose, size_t wanted) {
    const size_t size = whole_pages(wanted);
    Block block = exchange_waiting(purpose, {});
    if (block.size < size) {
      unmap(block);
      block = map(size);
      if (block.data == nullptr && release() > 0) block = map(size);
    } else if (block.size > kMuchSmaller * size) {
      unmap({static_cast<char*>(block.data) + size, block.size - size});
      block.size = size;
    }
    TORCH_CHECK_WITH(
        OutOfMemoryError, block.data != nullptr, "dpo_kernels: not enough memory for ", wanted, " bytes (", purpose,
        "). DefaultCPUAllocator: can't allocate memory. Kept probabilities obey memory_budget; gradients are as large as"
        " what they belong to");
    const std::lock_guard<std::mutex> guard(lock_);
    used_.emplace(block.data, Used{purpose, block});
    return block.data;
  }

  void give_back(void* data) {
    Used used;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      used = std::move(used_.extract(data).mapped());
    }
    unmap(lend_to_system(used.block) ? exchange_waiting(used.purpose, used.block) : used.block);
  }

  size_t release() {
    std::map<std::string, Block> waiting;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      waiting.swap(waiting_);
    }
    size_t bytes = 0;
    for (const auto& [_, block] : waiting) bytes += block.size, unmap(block);
    return bytes;
  }

 private:
  struct Used {
    std::string purpose;
    Block block;
  };
  std::mutex lock_;
  std::map<std::string, Block> waiting_;
  std::unordered_map<void*, Used> used_;
  std::map<std::string, Allocator> allocators_;

  // Lets the larger of two blocks wait and returns the other; {} takes what waits.
  Block exchange_waiting(const std::string& purpose, Block block) {
    const std::lock_guard<std::mutex> guard(lock_);
    Block& waiting = waiting_[purpose];
    if (block.data == nullptr || block.size > waiting.size) std::swap(waiting, block);
    return block;
  }
};

void give_back(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  Recycler::instance().give_back(data);
}

at::DataPtr Allocator::allocate(size_t wanted) {
  if (wanted < kSmall || kWatched) return c10::GetDefaultCPUAllocator()->allocate(wanted);
  void* data = Recycler::instance().take(purpose_, wanted);
  c10::profiledCPUMemoryReporter().New(data, wanted);
  return {data, data, &give_back, at::Device(at::kCPU)};
}

}  // namespace

at::Tensor recycled(const std::string& purpose, int64_t rows, int64_t columns, at::ScalarType dtype) {
  return at::detail::empty_generic(
      {rows, columns}, &Recycler::instance().allocator(purpose), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

int64_t release_recycled() { return static_cast<int64_t>(Recycler::instance().release()); }

}  // namespace dpo_kernels
