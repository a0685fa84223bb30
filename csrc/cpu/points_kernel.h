// Kernels of the points family; torch-free, see cpu/isa.h for the rules.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace maefast {

constexpr int64_t kPointLanes = 16;  // clouds are padded to whole registers of any instruction set

struct PlanesArgs {
  const void* points;  // [B, N, D]
  void* planes;        // [B, D, padded], the padding zero
  int64_t size, padded, coordinates;
  bool wide;  // float64
};

struct FarthestArgs {
  const void* planes;
  void* nearest;  // [B, padded], workspace
  int64_t* out;   // [B, count]
  int64_t size, padded, coordinates, count, start;
  bool wide;
};

struct KnnArgs {
  const void* planes;
  const void* queries;  // [B, Q, D]
  int64_t* index;       // [B, Q, k]
  void* distance;       // [B, Q, k]
  int64_t size, padded, coordinates, queries_each, k;
  bool wide;
};

struct PointsKernels {
  void (*to_planes)(const PlanesArgs& args, int64_t begin, int64_t end);          // clouds
  void (*farthest_points)(const FarthestArgs& args, int64_t begin, int64_t end);  // clouds
  void (*knn)(const KnnArgs& args, int64_t begin, int64_t end);                   // queries of all clouds
};

MAEFAST_KERNELS(PointsKernels, points_kernels)

}  // namespace maefast
