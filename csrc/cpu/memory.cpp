#include <cstdlib>
#include <string_view>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/host.h"

namespace maefast::cpu {
namespace {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
// Memory that the system gives anew is mapped page by page as it is first written. In pages of 4 KiB that
// takes longer than the writing itself, and malloc gives whatever is larger than 32 MiB back to the system
// every time. Smaller tensors ask too: malloc's heap shrinks and grows within a training step.
constexpr int64_t kLeast = int64_t{4} << 20;

bool wanted() {
  const char* asked = std::getenv("MAEFAST_HUGE_PAGES");
  return asked == nullptr || std::string_view(asked) != "off";
}

// No page outside of the tensor is touched, so it takes no more memory. A system that has no huge pages says
// so, which is no error here.
void ask_for_huge_pages(void* data, int64_t bytes) {
  static const bool asks = wanted();
  if (bytes < kLeast || !asks) return;
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#else
void ask_for_huge_pages(void*, int64_t) {}
#endif

}  // namespace

Tensor empty(const int64_t* sizes, int64_t count, ScalarType dtype, const Tensor& like) {
  Tensor out = maefast::empty(sizes, count, dtype, like);
  const int64_t bytes = out.numel() * static_cast<int64_t>(out.element_size());
  if (bytes > 0) ask_for_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

}  // namespace maefast::cpu
