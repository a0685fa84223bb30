// Helpers of the CPU ops' host code.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "common.h"
#include "cpu/dtype.h"
#include "cpu/patch.h"
#include "cpu/units.h"

namespace maefast::cpu {

// maefast::empty, with huge pages where the system gives them fast (memory.cpp; MAEFAST_HUGE_PAGES=on, off).
Tensor empty(const int64_t* sizes, int64_t count, ScalarType dtype, const Tensor& like);

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, like);
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype, like);
}

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, "maefast: expected a floating-point tensor");
  }
}

inline DType dtype_of(const Tensor& x) {
  return dtype_of(x.scalar_type());
}

inline bool is_half(DType type) {
  return type == DType::f16 || type == DType::bf16;
}

// Whether kernels convert `narrow` to `wide`: the same dtype, or 16 bits to float32.
inline bool widens(DType narrow, DType wide) {
  return narrow == wide || (is_half(narrow) && wide == DType::f32);
}

// Of the arithmetic that a storage type is handled in.
inline ScalarType arithmetic_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t element_size(DType type) {
  return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
}

// Plans and tensors come from Python, which checked them; these checks only keep a mismatch from touching
// memory that is not ours.
#define MAEFAST_CHECK(condition, ...) STD_TORCH_CHECK(condition, "maefast: ", __VA_ARGS__)

inline const int32_t* plan_data(const Tensor& x, const char* name) {
  MAEFAST_CHECK(x.scalar_type() == ScalarType::Int && x.is_contiguous(), name, " must be contiguous int32");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

inline const void* data(const Tensor& x, const char* name) {
  MAEFAST_CHECK(x.is_contiguous(), name, " must be contiguous");
  return x.const_data_ptr();
}

// cu [B+1] must rise from 0 to `total` by at most `tokens` a sample (host memory, a few loads).
inline const int32_t* cu_data(const Tensor& cu, int64_t total, int64_t tokens) {
  const int32_t* p = plan_data(cu, "cu");
  const int64_t batch = cu.numel() - 1;
  MAEFAST_CHECK(batch >= 1 && p[0] == 0 && p[batch] == total, "cu does not end at the number of packed rows");
  bool ok = true;
  for (int64_t b = 0; b < batch; ++b) ok &= p[b + 1] >= p[b] && p[b + 1] - p[b] <= tokens;
  MAEFAST_CHECK(ok, "cu must not fall, nor rise by more than the number of tokens");
  return p;
}

inline void check_plan(int32_t failed) {
  MAEFAST_CHECK(failed == 0, "the plan points outside its tensors (an index is out of range)");
}

inline PatchGrid patch_grid(int64_t batch, int64_t channels, int64_t frames, int64_t height, int64_t width,
                            const std::vector<int64_t>& patch) {
  MAEFAST_CHECK(patch.size() == 3 && patch[0] > 0 && patch[1] > 0 && patch[2] > 0,
                "patch must be [pt, ph, pw]");
  MAEFAST_CHECK(frames % patch[0] == 0 && height % patch[1] == 0 && width % patch[2] == 0,
                "image size must be a multiple of the patch size");
  return {batch, channels, frames, height, width, patch[0], patch[1], patch[2]};
}

inline PatchGrid patch_grid(const Tensor& images, const std::vector<int64_t>& patch) {
  MAEFAST_CHECK(images.dim() == 5, "images must be [B, C, T, H, W]");
  return patch_grid(images.size(0), images.size(1), images.size(2), images.size(3), images.size(4), patch);
}

inline int64_t tokens_of(const PatchGrid& g) {
  return (g.frames / g.pt) * (g.height / g.ph) * (g.width / g.pw);
}

inline int64_t values_of(const PatchGrid& g) {
  return g.channels * g.pt * g.ph * g.pw;
}

// Working memory of one thread, aligned to a cache line.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(new char[bytes + 63]) {}
  void* get() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// The cut of units.h: enough units for many threads, and no sum over more than 64 samples at a time.
inline Units cut_units(int64_t batch, int64_t length) {
  constexpr int64_t kChunk = 4;
  constexpr int64_t kUnits = 16;
  constexpr int64_t kSamples = 64;
  Units u{};
  u.chunk = kChunk;
  u.chunks = (length + kChunk - 1) / kChunk;
  u.pieces = (batch + kSamples - 1) / kSamples;
  if (u.chunks * u.pieces < kUnits) u.pieces = (kUnits + u.chunks - 1) / u.chunks;
  if (u.pieces > batch) u.pieces = batch;
  return u;
}

// Units of consecutive rows for sums over all rows; depends on the sizes alone, as cut_units.
inline int64_t row_units(int64_t rows) {
  constexpr int64_t kRows = 32;
  constexpr int64_t kUnits = 64;
  const int64_t units = (rows + kRows - 1) / kRows;
  return units < 1 ? 1 : units > kUnits ? kUnits : units;
}

// Where the sums of `rows` rows of width `width` over the pieces go: into `out` itself where there is nothing
// left to add or to convert, else into a buffer that finish() sums into `out`.
class Sums {
 public:
  Sums(Tensor out, int64_t rows, int64_t width, int64_t pieces)
      : out_(std::move(out)), size_(rows * width), pieces_(pieces), buffer_(out_) {
    const ScalarType type = arithmetic_type(out_.scalar_type());
    if (pieces > 1 || type != out_.scalar_type()) buffer_ = empty({pieces, size_}, type, out_);
    direct_ = pieces == 1 && type == out_.scalar_type();
    data_ = static_cast<char*>(buffer_.mutable_data_ptr());
  }

  // Start of row `row` of the first piece.
  void* at(int64_t row, int64_t width) const {
    return data_ + row * width * element_size(dtype_of(buffer_.scalar_type()));
  }
  int64_t stride() const { return size_; }

  void finish(void (*kernel)(const SumArgs&, int64_t, int64_t)) const {
    if (direct_) return;
    const SumArgs args{data_, out_.mutable_data_ptr(), pieces_, size_, dtype_of(out_.scalar_type())};
    parallel_rows(size_, 4 * (pieces_ + 1), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

 private:
  Tensor out_;
  int64_t size_, pieces_;
  Tensor buffer_;
  bool direct_;
  char* data_;
};

}  // namespace maefast::cpu
