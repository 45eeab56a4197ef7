// The gradients of thin factors: outer products of a wide and a thin matrix, summed over many rows; up to two at once.
// For Hopper.
//
//   out[c, r] = scale * sum over p of wide[p, c] * thin[p, r]                    or out[r, c], with `across`
//
// The wide sides are read once, and that is what takes time. A cluster has BOXES times 64 columns of one; its blocks
// share the rows, and add their sums through shared memory, in a fixed order. Two blocks stand on a multiprocessor, so
// that one copies while the other begins or ends.
//
// only sm_90a
// variants bf16: THIN=16 BOXES=2 CLUSTER=4 | THIN=16 BOXES=1 CLUSTER=8
// variants bf16: THIN=64 BOXES=1 CLUSTER=4 | THIN=64 BOXES=2 CLUSTER=4 | THIN=64 BOXES=1 CLUSTER=8
#define TILE_N (THIN * BOXES)
#include "skinny.cuh"
#include "cluster_sums.cuh"

constexpr int THIN_BYTES = TILE_K * THIN * 2, BYTES = BOXES * BOX + THIN_BYTES;
constexpr int PLACES = (110 * 1024 - PARTS_BYTES) / BYTES;
using Both = StageOf<BYTES, PLACES>;  // 64 rows of both sides
static_assert(PLACES >= 2, "one is copied while the other is read");

// A step of the thin side.
INLINE unsigned long long thin_operand(unsigned address) {
  return THIN == 16 ? narrow_operand(address) : operand(address, BOX);
}

// Grid: a cluster for each BOXES * 64 columns of the first wide side, and then of the second. across: as above, a bit
// for each. ranks: of both, even.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP + 32, 2)
    NAME(thin_outer)(const __grid_constant__ TensorMap wide,   // (rows, columns)
                     const __grid_constant__ TensorMap thin,   // (rows, ranks)
                     const __grid_constant__ TensorMap wide2,  // (rows, columns2)
                     const __grid_constant__ TensorMap thin2,  // (rows, ranks)
                     const float* scale,                       // (1,), or null for 1
                     const float* scale2,                      // likewise
                     float* out,                               // (columns, ranks) or (ranks, columns)
                     float* out2,                              // likewise, of columns2
                     int rows, int columns, int columns2, int ranks, int across) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * PLACES + 1];
  Both place = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  const int rank = cluster_rank(), cluster = blockIdx.x / CLUSTER;
  const int before = (columns + 64 * BOXES - 1) / (64 * BOXES);
  const bool second = cluster >= before;
  const int column = (cluster - (second ? before : 0)) * 64 * BOXES;
  const Parts parts = {place.memory + PLACES * BYTES, shared_address(barriers + 2 * PLACES), rank, TILE_N / 8};
  const int steps = (rows + TILE_K - 1) / TILE_K, from = rank * steps / CLUSTER, to = (rank + 1) * steps / CLUSTER;
  if (threadIdx.x == 0) parts.begin(GROUP / 32), place.begin();
  __syncthreads();
  arrive();

  if (threadIdx.x >= GROUP) {
    if (threadIdx.x == GROUP) {
      const TensorMap *a = second ? &wide2 : &wide, *b = second ? &thin2 : &thin;
      prefetch_map(a), prefetch_map(b);
#pragma unroll 1
      for (int step = from; step < to; ++step) {
        place.claim();
#pragma unroll
        for (int box = 0; box < BOXES; ++box)
          copy_box(place.a() + box * BOX, a, place.full(), column + box * 64, step * TILE_K);
        copy_box(place.a() + BOXES * BOX, b, place.full(), 0, step * TILE_K);
        place.next();
      }
    }
    await();
    return;
  }

  float sum[PIECES * 4] = {};
  Both read = place;  // what products may still read
  settle(sum);
#pragma unroll 1
  for (int step = from; step < to; ++step) {
    barrier_wait(place.full(), place.parity);
    const unsigned b = place.a() + BOXES * BOX;
    products_begin();
#pragma unroll
    for (int s = 0; s < TILE_K / 16; ++s)
#pragma unroll
      for (int box = 0; box < BOXES; ++box)
        wgmma_turned<THIN>(sum + box * (THIN / 2), operand(place.a() + box * BOX + s * 16 * ROW_BYTES, BOX),
                           thin_operand(b + s * 16 * THIN * 2));
    products_commit();
    place.next();
    products_wait<1>();
    if (step > from) read.release(), read.next();
  }
  products_wait<0>();
  settle(sum);

  await();  // until all blocks of the cluster have begun, long ago
  float own[MOST][4];
  parts.send(sum, own);
  parts.receive(own);
  const float* by = second ? scale2 : scale;
  const float factor = by ? *by : 1.0f;
  const int width = second ? columns2 : columns;
  float* y = second ? out2 : out;
#pragma unroll
  for (int i = 0; i < MOST * 2; ++i) {
    if (i / 2 >= parts.count()) continue;
    const int n = (first_of(rank) + i / 2) * 8, r = n % THIN + threadIdx.x % 4 * 2;
    const int c = column + n / THIN * 64 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8;
    if (c >= width || r >= ranks) continue;
    const float one = factor * own[i / 2][i % 2 * 2], next = factor * own[i / 2][i % 2 * 2 + 1];
    if (across >> second & 1)
      y[(long long)r * width + c] = one, y[(long long)(r + 1) * width + c] = next;
    else
      *reinterpret_cast<float2*>(y + (long long)c * ranks + r) = make_float2(one, next);
  }
}
