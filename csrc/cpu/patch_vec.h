// Walks over the pixels of one patch. For kernel files.
#pragma once

#include "cpu/patch.h"
#include "cpu/vec.h"

namespace maefast::MAEFAST_ISA {
namespace {

// A PatchGrid with its derived sizes.
struct Grid {
  int64_t channels, plane, width, image;  // plane = H*W, image = C*T*H*W elements
  int64_t pt, ph, pw;
  int64_t gt, gh, gw, tokens, values, channel_stride;

  explicit Grid(const PatchGrid& g)
      : channels(g.channels),
        plane(g.height * g.width),
        width(g.width),
        image(g.channels * g.frames * g.height * g.width),
        pt(g.pt),
        ph(g.ph),
        pw(g.pw),
        gt(g.frames / g.pt),
        gh(g.height / g.ph),
        gw(g.width / g.pw),
        tokens(gt * gh * gw),
        values(g.channels * g.pt * g.ph * g.pw),
        channel_stride(g.frames * plane) {}

  // Element offset of the first pixel of flat token b*N + n.
  int64_t origin(int64_t flat) const {
    const int64_t b = flat / tokens;
    const int64_t n = flat - b * tokens;
    const int64_t w = n % gw;
    const int64_t h = n / gw % gh;
    const int64_t t = n / gw / gh;
    return b * image + t * pt * plane + h * ph * width + w * pw;
  }
};

// Calls f(pixel offset from the patch's origin, offset in (C, pt, ph, pw) order) for each run of pw pixels.
template <class F>
MAEFAST_INLINE void for_runs(const Grid& g, const F& f) {
  int64_t k = 0;
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t t = 0; t < g.pt; ++t) {
      int64_t offset = c * g.channel_stride + t * g.plane;
      for (int64_t y = 0; y < g.ph; ++y, offset += g.width, k += g.pw) f(offset, k);
    }
}

}  // namespace
}  // namespace maefast::MAEFAST_ISA
