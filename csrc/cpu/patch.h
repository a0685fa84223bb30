// How an image [B, C, T, H, W] is cut into patches; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace maefast {

// Tokens are row-major over (T/pt, H/ph, W/pw). 2-D images have T = pt = 1.
struct PatchGrid {
  int64_t batch, channels, frames, height, width;
  int64_t pt, ph, pw;
};

}  // namespace maefast
