#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>

#ifdef __linux__
#include <dirent.h>
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

// Whether this is a virtual machine that tells its host which memory is free, which takes it back: a huge
// page that was free for a second or two is then fetched anew in 512 pieces, which takes four times as long
// as the small pages do that are at hand (docs/experiments.md).
bool gives_back_free_pages() {
  const char* folder = "/sys/bus/virtio/drivers/virtio_balloon";
  DIR* devices = opendir(folder);
  if (devices == nullptr) return false;
  bool found = false;
  while (const dirent* entry = readdir(devices)) {
    std::ifstream file(std::string(folder) + "/" + entry->d_name + "/features");
    std::string bits;  // one character each, the lowest first
    constexpr size_t kReporting = 5;
    if (std::getline(file, bits) && bits.size() > kReporting) found |= bits[kReporting] == '1';
  }
  closedir(devices);
  return found;
}

bool wanted() {
  const char* asked = std::getenv("MAEFAST_HUGE_PAGES");
  const std::string_view answer = asked == nullptr ? "" : asked;
  return answer == "on" || (answer != "off" && !gives_back_free_pages());
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
