// Group normalization where groups are large: the positions of a sample are cut into parts, a block each, so that a
// wide image fills the device, and every row of channels is read as it lies. Means and squares of parts are joined as
// Chan, Golub & LeVeque 1979 do, around each part's own mean, in an order that the sizes alone decide. Grids (samples,
// parts).
#include "each.cuh"
#include "real.cuh"

constexpr int THREADS = 256;

// The positions of this block, and V channels of each that a thread owns at a time: `columns` threads side by side,
// `rows` positions at once.
template <int V>
struct Walk {
  int channels, first, last, columns, rows, column, row;

  __device__ __forceinline__ Walk(int positions, int channels) : channels(channels) {
    const int share = (positions + gridDim.y - 1) / gridDim.y;
    first = min(int(blockIdx.y) * share, positions);
    last = min(first + share, positions);
    columns = min(channels / V, THREADS);
    rows = THREADS / columns;
    column = threadIdx.x % columns;
    row = threadIdx.x / columns;  // those of `rows` and above are idle
  }

  // body(channel, valid) for the channels of this thread; as often in every thread, valid where there is one.
  template <class F>
  __device__ __forceinline__ void channels_of(F body) const {
    for (int base = 0; base < channels; base += columns * V) {
      const int c = base + column * V;
      body(c, row < rows && c < channels);
    }
  }
};

// sums[c] = the sum over the block's positions of what values(c), made once a channel, adds for each: a function of V
// sums, those of the channels from c on, and a position. lane: (THREADS * V), shared. All threads call it.
template <int V, class F>
__device__ __forceinline__ void column_sums(const Walk<V>& walk, A* lane, A* sums, F values) {
  walk.channels_of([&](int c, bool valid) {
    A sum[V] = {};
    const auto add = values(valid ? c : 0);
#pragma unroll(V > 1 ? 1 : 4)  // a pack a thread keeps enough under way
    for (int p = walk.first + walk.row; valid && p < walk.last; p += walk.rows) add(sum, p);
#pragma unroll
    for (int j = 0; j < V; j++) lane[j * THREADS + threadIdx.x] = sum[j];
    __syncthreads();
    for (int j = 0; valid && walk.row == 0 && j < V; j++) {
      A total = A(0);
      for (int r = 0; r < walk.rows; r++) total += lane[j * THREADS + r * walk.columns + walk.column];
      sums[c + j] = total;
    }
    __syncthreads();
  });
}

template <int V>
__device__ __forceinline__ Pack<T, V> load(const T* x, long long at) {
  return *reinterpret_cast<const Pack<T, V>*>(x + at);
}

// The sum of the `width` values of group g.
__device__ __forceinline__ A of_group(const A* values, int g, int width) {
  A sum = A(0);
  for (int j = 0; j < width; j++) sum += values[g * width + j];
  return sum;
}

template <int V>
__device__ __forceinline__ void parts_of(const T* x, A* parts, int positions, int channels, int groups, A* shared) {
  __shared__ A lane[THREADS * V];
  A *sums = shared, *means = shared + channels;
  const Walk<V> walk(positions, channels);
  const int width = channels / groups;
  const A count = max(A(walk.last - walk.first) * width, A(1));
  column_sums<V>(walk, lane, sums, [=](int c) {
    return [=](A(&sum)[V], int p) {
      const Pack<T, V> v = load<V>(x, (long long)p * channels + c);
      for (int j = 0; j < V; j++) sum[j] += widen(v.at[j]);
    };
  });
  for (int g = threadIdx.x; g < groups; g += THREADS) means[g] = of_group(sums, g, width) / count;
  __syncthreads();
  column_sums<V>(walk, lane, sums, [=](int c) {
    Pack<A, V> mean;
    for (int j = 0; j < V; j++) mean.at[j] = means[(c + j) / width];
    return [=](A(&sum)[V], int p) {
      const Pack<T, V> v = load<V>(x, (long long)p * channels + c);
      for (int j = 0; j < V; j++) {
        const A d = widen(v.at[j]) - mean.at[j];
        sum[j] += d * d;
      }
    };
  });
  for (int g = threadIdx.x; g < groups; g += THREADS) {
    parts[2 * g] = means[g];
    parts[2 * g + 1] = of_group(sums, g, width);
  }
}

// parts: mean, and the sum of squares around it, of each group in this block's part. Shared: channels + groups of A.
extern "C" __global__ void __launch_bounds__(THREADS) NAME(norm_parts)(const T* x,  // (samples, positions, channels)
                                                                       A* parts,    // (samples, parts, groups, 2)
                                                                       int positions, int channels, int groups) {
  extern __shared__ __align__(16) A shared[];
  x += (long long)blockIdx.x * positions * channels;
  parts += 2LL * (blockIdx.x * (long long)gridDim.y + blockIdx.y) * groups;
  if (channels % PACK == 0 && aligned(x))
    parts_of<PACK>(x, parts, positions, channels, groups, shared);
  else
    parts_of<1>(x, parts, positions, channels, groups, shared);
}

__device__ __forceinline__ A warp_sum(A value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// stats: mean and 1 / deviation of each group of each sample. A warp a group. Grid (groups, samples), block 32.
extern "C" __global__ void __launch_bounds__(32)
    NAME(norm_join)(const A* parts,  // (samples, parts, groups, 2)
                    A* stats,        // (samples, groups, 2)
                    A eps, int positions, int channels, int groups, int part_count) {
  const int g = blockIdx.x, width = channels / groups, share = (positions + part_count - 1) / part_count;
  const auto of = [=](int part) { return parts + 2 * ((blockIdx.y * (long long)part_count + part) * groups + g); };
  const auto count = [=](int part) { return A(max(min(share, positions - part * share), 0)) * width; };
  const A total = A(positions) * width;
  A sum = A(0), squares = A(0);
  for (int part = threadIdx.x; part < part_count; part += 32) sum += of(part)[0] * count(part);
  const A mean = warp_sum(sum) / total;
  for (int part = threadIdx.x; part < part_count; part += 32) {
    const A d = of(part)[0] - mean;
    squares += of(part)[1] + count(part) * d * d;
  }
  squares = warp_sum(squares);
  if (threadIdx.x) return;
  A* mine = stats + 2 * (blockIdx.y * (long long)groups + g);
  mine[0] = mean;
  mine[1] = A(1) / root(squares / total + eps);
}

template <int V>
__device__ __forceinline__ void apply(const T* x, const A* weight, const A* bias, const A* stats, T* out, int positions,
                                      int channels, int width) {
  const Walk<V> walk(positions, channels);
  walk.channels_of([&](int c, bool valid) {
    if (!valid) return;
    A mean[V], inverse[V], w[V], b[V];
    for (int j = 0; j < V; j++) {
      const A* own = stats + 2 * ((c + j) / width);
      mean[j] = own[0], inverse[j] = own[1], w[j] = weight[c + j], b[j] = bias[c + j];
    }
#pragma unroll(V > 1 ? 1 : 4)
    for (int p = walk.first + walk.row; p < walk.last; p += walk.rows) {
      const long long at = (long long)p * channels + c;
      Pack<T, V> v = load<V>(x, at);
      for (int j = 0; j < V; j++) v.at[j] = narrow((widen(v.at[j]) - mean[j]) * inverse[j] * w[j] + b[j]);
      *reinterpret_cast<Pack<T, V>*>(out + at) = v;
    }
  });
}

// out = (x - mean) / deviation * weight + bias.
extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(norm_apply)(const T* x, const A* weight, const A* bias,
                     const A* stats,  // (samples, groups, 2)
                     T* out, int positions, int channels, int groups) {
  const long long start = (long long)blockIdx.x * positions * channels;
  stats += 2LL * blockIdx.x * groups;
  x += start;
  out += start;
  if (channels % PACK == 0 && aligned(x) && aligned(out))
    apply<PACK>(x, weight, bias, stats, out, positions, channels, channels / groups);
  else
    apply<1>(x, weight, bias, stats, out, positions, channels, channels / groups);
}

template <int V>
__device__ __forceinline__ void slopes_of(const T* g, const T* x, const A* weight, const A* stats, A* parts, A* slopes,
                                          int positions, int channels, int groups, A* shared) {
  __shared__ A lane[THREADS * V];
  A *plain = shared, *along = shared + channels;
  const Walk<V> walk(positions, channels);
  const int width = channels / groups;
  column_sums<V>(walk, lane, plain, [=](int c) {
    return [=](A(&sum)[V], int p) {
      const Pack<T, V> d = load<V>(g, (long long)p * channels + c);
      for (int j = 0; j < V; j++) sum[j] += widen(d.at[j]);
    };
  });
  column_sums<V>(walk, lane, along, [=](int c) {
    Pack<A, V> mean, inverse;
    for (int j = 0; j < V; j++) {
      mean.at[j] = stats[2 * ((c + j) / width)];
      inverse.at[j] = stats[2 * ((c + j) / width) + 1];
    }
    return [=](A(&sum)[V], int p) {
      const Pack<T, V> d = load<V>(g, (long long)p * channels + c), v = load<V>(x, (long long)p * channels + c);
      for (int j = 0; j < V; j++) sum[j] += widen(d.at[j]) * (widen(v.at[j]) - mean.at[j]) * inverse.at[j];
    };
  });
  for (int c = threadIdx.x; c < channels; c += THREADS) {
    if (slopes) slopes[c] = along[c];
    plain[c] *= weight[c];
    along[c] *= weight[c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < groups; i += THREADS) {
    parts[2 * i] = of_group(plain, i, width);
    parts[2 * i + 1] = of_group(along, i, width);
  }
}

// With n = (x - mean) / deviation, of this block's part: the sums over each group of g * weight and of g * weight * n;
// and over each channel of g * n, whose sum over parts and samples is the gradient of the weight. Shared: 2 * channels
// of A.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    NAME(norm_parts_d)(const T* g, const T* x, const A* weight, const A* stats,
                       A* parts,   // (samples, parts, groups, 2)
                       A* slopes,  // (samples, parts, channels), or null
                       int positions, int channels, int groups) {
  extern __shared__ __align__(16) A shared[];
  const long long start = (long long)blockIdx.x * positions * channels;
  const long long part = blockIdx.x * (long long)gridDim.y + blockIdx.y;
  g += start;
  x += start;
  stats += 2LL * blockIdx.x * groups;
  parts += 2 * part * groups;
  if (slopes) slopes += part * channels;
  if (channels % PACK == 0 && aligned(x) && aligned(g))
    slopes_of<PACK>(g, x, weight, stats, parts, slopes, positions, channels, groups, shared);
  else
    slopes_of<1>(g, x, weight, stats, parts, slopes, positions, channels, groups, shared);
}

// means: the two sums over all parts, divided by the values of a group. As norm_join.
extern "C" __global__ void __launch_bounds__(32)
    NAME(norm_join_d)(const A* parts,  // (samples, parts, groups, 2)
                      A* means,        // (samples, groups, 2)
                      int positions, int channels, int groups, int part_count) {
  A plain = A(0), along = A(0);
  for (int part = threadIdx.x; part < part_count; part += 32) {
    const A* own = parts + 2 * ((blockIdx.y * (long long)part_count + part) * groups + blockIdx.x);
    plain += own[0];
    along += own[1];
  }
  plain = warp_sum(plain);
  along = warp_sum(along);
  if (threadIdx.x) return;
  A* mine = means + 2 * (blockIdx.y * (long long)groups + blockIdx.x);
  const A count = A(positions) * (channels / groups);
  mine[0] = plain / count;
  mine[1] = along / count;
}

template <int V>
__device__ __forceinline__ void apply_d(const T* g, const T* x, const A* weight, const A* stats, const A* means, T* dx,
                                        int positions, int channels, int width) {
  const Walk<V> walk(positions, channels);
  walk.channels_of([&](int c, bool valid) {
    if (!valid) return;
    A mean[V], inverse[V], w[V], plain[V], along[V];
    for (int j = 0; j < V; j++) {
      const int group = (c + j) / width;
      mean[j] = stats[2 * group], inverse[j] = stats[2 * group + 1], w[j] = weight[c + j];
      plain[j] = means[2 * group], along[j] = means[2 * group + 1];
    }
#pragma unroll(V > 1 ? 1 : 4)
    for (int p = walk.first + walk.row; p < walk.last; p += walk.rows) {
      const long long at = (long long)p * channels + c;
      const Pack<T, V> d = load<V>(g, at);
      Pack<T, V> v = load<V>(x, at);
      for (int j = 0; j < V; j++) {
        const A n = (widen(v.at[j]) - mean[j]) * inverse[j];
        v.at[j] = narrow((widen(d.at[j]) * w[j] - plain[j] - n * along[j]) * inverse[j]);
      }
      *reinterpret_cast<Pack<T, V>*>(dx + at) = v;
    }
  });
}

// dx = (h - mean(h) - n * mean(h * n)) / deviation with h = g * weight.
extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(norm_apply_d)(const T* g, const T* x, const A* weight, const A* stats, const A* means, T* dx, int positions,
                       int channels, int groups) {
  const long long start = (long long)blockIdx.x * positions * channels;
  stats += 2LL * blockIdx.x * groups;
  means += 2LL * blockIdx.x * groups;
  g += start;
  x += start;
  dx += start;
  if (channels % PACK == 0 && aligned(x) && aligned(g) && aligned(dx))
    apply_d<PACK>(g, x, weight, stats, means, dx, positions, channels, channels / groups);
  else
    apply_d<1>(g, x, weight, stats, means, dx, positions, channels, channels / groups);
}
