// Convolutions whose groups are a few channels wide (depthwise first of all), where a matrix tile would be mostly
// empty.
//
// A block is blockDim.x column chunks x blockDim.y positions, columns fastest, so that neighbours read neighbouring
// words.
#pragma once
#include "conv_walk.cuh"

// One thread: one position, V neighbouring columns. V > 1 only for one channel in and one out a group (depthwise).
template <int V, bool BACK>
INLINE void direct(const T* in, const T* w, const A* scale, const T* add, const T* bias, T* out, const Geometry& g,
                   int positions, int inner, int outer, int groups, int shared) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * V, p = blockIdx.x * blockDim.y + threadIdx.y;
  if (column >= groups * outer || p >= positions) return;
  const int group = column / outer, own = column % outer, in_row = groups * inner;
  const int w_columns = BACK ? inner : outer, w_row = shared ? w_columns : groups * w_columns;
  const int taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
  in += group * inner;
  if (!shared) w += group * w_columns;

  Rows<1, BACK> row;
  row.start(0, p, positions, g);
  A sum[V] = {};
  Tap tap = Tap::of(0, 1, g);
  for (int t = 0; t < taps; ++t, tap.forward(1, 1, g)) {
    const int pixel = row.pixel(0, tap, g);
    if (pixel < 0) continue;
    const T* from = in + (long long)pixel * in_row;
    if (V > 1) {
      const auto a = *reinterpret_cast<const Pack<T, V>*>(from);
      const auto b = *reinterpret_cast<const Pack<T, V>*>(w + (long long)t * w_row);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += widen(a.at[v]) * widen(b.at[v]);
    } else {  // forward: w[t, i, own]; back: w[t, own, j]
      for (int i = 0; i < inner; ++i)
        sum[0] += widen(from[i]) * widen(BACK ? w[(long long)(t * outer + own) * w_row + i]
                                              : w[(long long)(t * inner + i) * w_row + own]);
    }
  }

  const A factor = scale ? *scale : A(1);
  const long long at = (long long)p * (groups * outer) + column;
  Pack<T, V> narrow_out;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    sum[v] *= factor;
    if (add) sum[v] += widen(add[at + v]);
    if (bias) sum[v] += widen(bias[column + v]);
    narrow_out.at[v] = narrow(sum[v]);
  }
  *reinterpret_cast<Pack<T, V>*>(out + at) = narrow_out;
}

// One block: 32 columns of dy, one (tap, channel) of the weight, the positions of one split; blockDim = (32, 8).
// partials: (splits, taps * I, groups * O), summed later, over the groups too if the weight is shared.
INLINE void direct_outer(const T* x, const T* dy, A* partials, const Geometry& g, int positions, int inner, int outer,
                         int groups, int span) {
  __shared__ A lanes[8][33];
  const int columns = groups * outer, column = blockIdx.x * 32 + threadIdx.x, group = column / outer;
  const int row = blockIdx.z, rows = gridDim.z, first = blockIdx.y * span, past = min(positions, first + span);
  const Tap tap = Tap::of(row, inner, g);
  const Place pass = Place::of(8, g);
  Place place = Place::of(first + threadIdx.y, g);
  A sum = 0;
  if (column < columns)
    for (int p = first + threadIdx.y; p < past; p += 8, place.add(pass, g)) {
      const int pixel = pixel_read(place, tap, g);
      if (pixel >= 0)
        sum += widen(x[(long long)pixel * (groups * inner) + group * inner + tap.channel]) *
               widen(dy[(long long)p * columns + column]);
    }
  lanes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
#pragma unroll
  for (int y = 1; y < 8; ++y) sum += lanes[y][threadIdx.x];
  partials[((long long)blockIdx.y * rows + row) * columns + column] = sum;
}
