#include "cpu/memory.h"

#include <cstdlib>
#include <cstring>
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

bool huge_pages() {
  static const bool wanted = [] {
    const char* asked = std::getenv("MAEFAST_HUGE_PAGES");
    const std::string_view answer = asked == nullptr ? "" : asked;
    return answer == "on" || (answer != "off" && !gives_back_free_pages());
  }();
  return wanted;
}

uintptr_t page_size() {
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return page;
}

// The whole pages of a tensor.
struct Pages {
  Pages(void* data, int64_t bytes)
      : begin((reinterpret_cast<uintptr_t>(data) + page_size() - 1) / page_size() * page_size()),
        end((reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page_size() * page_size()) {
  }
  int advise(int advice) const { return madvise(reinterpret_cast<void*>(begin), end - begin, advice); }
  uintptr_t begin, end;
};

// No page outside of the tensor is touched, so it takes no more memory. A system that has no huge pages says
// so, which is no error here.
void ask_for_huge_pages(void* data, int64_t bytes) {
  if (bytes >= kLeast && huge_pages()) Pages(data, bytes).advise(MADV_HUGEPAGE);
}

// Whether large blocks are private memory, of which the system gives zeros once it was told that nobody needs
// what was there. An allocator of shared memory keeps it.
bool forgets() {
  void* block = nullptr;
  if (posix_memalign(&block, 64, kLeast) != 0) return false;
  Pages pages(block, kLeast);
  volatile char* first = reinterpret_cast<volatile char*>(pages.begin);
  *first = 1;
  const bool zero = pages.advise(MADV_DONTNEED) == 0 && *first == 0;
  std::free(block);
  return zero;
}

// Makes zeros of memory that nobody has touched yet, in time that does not grow with its size; false, and
// nothing is promised, where it was in use before: to map that again would take longer than to write it.
bool zeros_for_free(void* data, int64_t bytes) {
  static const bool can = forgets();
  if (bytes < kLeast || !can) return false;
  const Pages pages(data, bytes);
  const uintptr_t middle = pages.begin + (pages.end - pages.begin) / page_size() / 2 * page_size();
  unsigned char in_use = 1;
  if (mincore(reinterpret_cast<void*>(middle), page_size(), &in_use) != 0 || (in_use & 1) != 0) return false;
  if (pages.advise(MADV_DONTNEED) != 0) return false;
  char* begin = static_cast<char*>(data);
  std::memset(begin, 0, pages.begin - reinterpret_cast<uintptr_t>(data));
  std::memset(reinterpret_cast<char*>(pages.end), 0, reinterpret_cast<uintptr_t>(begin + bytes) - pages.end);
  return true;
}

// Whether that pays: to map small pages under the rows alone against huge ones under everything, which take
// about a quarter of the time, or all small ones.
bool few(int64_t written, int64_t row_bytes, int64_t bytes) {
  const int64_t page = static_cast<int64_t>(page_size());
  const int64_t touched = written * (row_bytes / page + 2);
  return touched * (huge_pages() ? 4 : 1) < bytes / page;
}
#else
void ask_for_huge_pages(void*, int64_t) {}
bool zeros_for_free(void*, int64_t) {
  return false;
}
bool few(int64_t, int64_t, int64_t) {
  return false;
}
#endif

}  // namespace

Tensor empty(const int64_t* sizes, int64_t count, ScalarType dtype, const Tensor& like) {
  Tensor out = maefast::empty(sizes, count, dtype, like);
  const int64_t bytes = out.numel() * static_cast<int64_t>(out.element_size());
  if (bytes > 0) ask_for_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

Tensor empty_or_zeros(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like,
                      int64_t written, bool* zeroed) {
  Tensor out = maefast::empty(sizes, dtype, like);
  const int64_t element = static_cast<int64_t>(out.element_size());
  const int64_t bytes = out.numel() * element;
  *zeroed = false;
  if (bytes == 0) return out;
  const int64_t row_bytes = sizes.begin()[sizes.size() - 1] * element;
  *zeroed = few(written, row_bytes, bytes) && zeros_for_free(out.mutable_data_ptr(), bytes);
  if (!*zeroed) ask_for_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

}  // namespace maefast::cpu
