// Convolutions with few outputs, as a product with all taps side by side and a sum of shifted rows.
//
// shifted_sum  y[p, r] = add[p, r] + scale * sum over taps t of parts[pixel(p, t), t, r] + bias[r]
// spread       columns[q, t, r] = g[o, r] where position o reads pixel q at tap t, else 0: the way back
//
// x is then read once, not once a tap. A thread does VEC neighbouring r.
// variants bf16: VEC=8 | VEC=4 | VEC=1
#include "types.cuh"
#include "conv_walk.cuh"

INLINE Tap tap_at(int z, int y, int x, const Geometry& g) {
  Tap t;
  t.channel = 0, t.index = (z * g.kernel[1] + y) * g.kernel[2] + x, t.z = z, t.y = y, t.x = x;
  return t;
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(shifted_sum)(const A* parts,  // (pixels, taps, R)
                      const A* scale,  // (1,), or null
                      const T* add,    // (positions, R), or null
                      const T* bias,   // (R), or null
                      T* y,            // (positions, R)
                      const Geometry g, int positions, int R) {
  const int chunks = R / VEC, taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
  const unsigned i = blockIdx.x * 256u + threadIdx.x;  // positions * R is below 2^31
  const int p = i / chunks, r = i % chunks * VEC;
  if (p >= positions) return;
  const Place at = Place::of(p, g);
  A sum[VEC] = {};
#pragma unroll 1
  for (int z = 0; z < g.kernel[0]; ++z)
    for (int ty = 0; ty < g.kernel[1]; ++ty)
      for (int tx = 0; tx < g.kernel[2]; ++tx) {
        const Tap t = tap_at(z, ty, tx, g);
        const int pixel = pixel_read(at, t, g);
        if (pixel < 0) continue;
        const auto v = *reinterpret_cast<const Pack<A, VEC>*>(parts + ((long long)pixel * taps + t.index) * R + r);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] += v.at[j];
      }
  const A s = scale ? *scale : A(1);
  const long long to = (long long)p * R + r;
  Pack<T, VEC> out;
#pragma unroll
  for (int j = 0; j < VEC; ++j)
    out.at[j] = narrow((add ? widen(add[to + j]) : A(0)) + s * sum[j] + (bias ? widen(bias[r + j]) : A(0)));
  *reinterpret_cast<Pack<T, VEC>*>(y + to) = out;
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(spread)(const T* g,  // (positions, R)
                 T* columns,  // (pixels, taps, R)
                 const Geometry walk, int pixels, int R) {
  const int chunks = R / VEC, taps = walk.kernel[0] * walk.kernel[1] * walk.kernel[2];
  const long long i = blockIdx.x * 256LL + threadIdx.x;
  const long long place = i / chunks;  // (pixel, tap)
  const int pixel = int(place / taps), tap = int(place % taps), r = int(i % chunks) * VEC;
  if (pixel >= pixels) return;
  Rows<1, true> row;
  row.start(0, pixel, pixels, walk);
  const int y = tap / walk.kernel[2];
  const int from = row.pixel(0, tap_at(y / walk.kernel[1], y % walk.kernel[1], tap % walk.kernel[2], walk), walk);
  Pack<T, VEC> v = {};
  if (from >= 0) v = *reinterpret_cast<const Pack<T, VEC>*>(g + (long long)from * R + r);
  *reinterpret_cast<Pack<T, VEC>*>(columns + place * R + r) = v;
}
