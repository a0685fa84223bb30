#include "cpu/host.h"
#include "cpu/ops.h"
#include "cpu/points_kernel.h"

namespace maefast::cpu {
namespace {

bool is_wide(const Tensor& x, const char* name) {
  MAEFAST_CHECK(x.dim() == 3 && x.size(2) >= 1 && x.size(2) <= 16 && x.is_contiguous() &&
                    (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double),
                name, " must be [B, N, D], contiguous, float32 or float64, D up to 16");
  return x.scalar_type() == ScalarType::Double;
}

int64_t padded_size(int64_t size) {
  return (size + kPointLanes - 1) / kPointLanes * kPointLanes;
}

Tensor planes_of(const Tensor& points, bool wide) {
  PlanesArgs args;
  args.size = points.size(1);
  args.padded = padded_size(args.size);
  args.coordinates = points.size(2);
  args.wide = wide;
  Tensor planes = empty({points.size(0), args.coordinates, args.padded}, points.scalar_type(), points);
  args.points = points.const_data_ptr();
  args.planes = planes.mutable_data_ptr();
  const auto kernel = points_kernels_chosen().to_planes;
  parallel_rows(points.size(0), 8 * args.coordinates * args.padded,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return planes;
}

}  // namespace

Tensor farthest_points(const Tensor& points, int64_t count, int64_t start) {
  const bool wide = is_wide(points, "points");
  const int64_t batch = points.size(0);
  FarthestArgs args;
  args.size = points.size(1);
  args.padded = padded_size(args.size);
  args.coordinates = points.size(2);
  args.count = count;
  args.start = start;
  args.wide = wide;
  MAEFAST_CHECK(count >= 1 && count <= args.size && start >= 0 && start < args.size,
                "farthest_points: count or start outside the cloud");
  const Tensor planes = planes_of(points, wide);
  Tensor nearest = empty({batch, args.padded}, points.scalar_type(), points);
  Tensor out = empty({batch, count}, ScalarType::Long, points);
  args.planes = planes.const_data_ptr();
  args.nearest = nearest.mutable_data_ptr();
  args.out = static_cast<int64_t*>(out.mutable_data_ptr());
  const auto kernel = points_kernels_chosen().farthest_points;
  parallel_rows(batch, count * args.padded * args.coordinates * 4,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> knn(const Tensor& queries, const Tensor& points, int64_t k) {
  const bool wide = is_wide(points, "points");
  MAEFAST_CHECK(is_wide(queries, "queries") == wide && queries.size(0) == points.size(0) &&
                    queries.size(2) == points.size(2) && k >= 1 && k <= points.size(1),
                "knn: queries and points must agree, and k fit a cloud");
  const int64_t batch = points.size(0), each = queries.size(1);
  KnnArgs args;
  args.size = points.size(1);
  args.padded = padded_size(args.size);
  args.coordinates = points.size(2);
  args.queries_each = each;
  args.k = k;
  args.wide = wide;
  const Tensor planes = planes_of(points, wide);
  Tensor index = empty({batch, each, k}, ScalarType::Long, points);
  Tensor distance = empty({batch, each, k}, points.scalar_type(), points);
  args.planes = planes.const_data_ptr();
  args.queries = queries.const_data_ptr();
  args.index = static_cast<int64_t*>(index.mutable_data_ptr());
  args.distance = distance.mutable_data_ptr();
  const auto kernel = points_kernels_chosen().knn;
  parallel_rows(batch * each, args.padded * args.coordinates * 4,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {index, distance};
}

}  // namespace maefast::cpu
