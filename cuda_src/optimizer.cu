// A step of an optimizer over all factors at once: masters T, state A, in flat buffers; gradients where they are.
// Masters of bf16 have no wide copy: they are rounded stochastically. The sums over all gradients take two launches,
// the partial sums of the chunks and their sum, in an order that the sizes alone decide.
#include "multi_tensor.cuh"

constexpr int FINISH = 1024;  // threads of the one block that sums the partial sums
constexpr int NUMBERS = 480;

// What the host tells of a step.
struct Numbers {
  double at[NUMBERS];
};

// The bits of a stochastic rounding: key, and the step on the device, so that a captured graph draws anew.
struct Bits {
  const unsigned* step;
  unsigned key_low, key_high;
};

__device__ __forceinline__ float root(float value) {
  return sqrtf(value);
}
__device__ __forceinline__ double root(double value) {
  return sqrt(value);
}

// Masters as they are kept, of the values of a step; `values` are then what was kept.
__device__ __forceinline__ Quad kept(const Quad& values, const Bits&, unsigned, unsigned, A) {
  return values;
}
__device__ __forceinline__ Pack<bf16, 4> kept(Quad& values, const Bits& bits, unsigned quad, unsigned place, bf16) {
  const Pack<bf16, 4> out =
      round_stochastically(values, random_words(quad, place, bits.step[0], bits.key_low, bits.key_high));
#pragma unroll
  for (int e = 0; e < 4; ++e) values.at[e] = widen(out.at[e]);
  return out;
}

// method(p, g, state) of every value. clip: (1), what gradients are multiplied by, or null.
template <int SLOTS, class Method>
__device__ __forceinline__ void update(const Work& work, const Piece& piece, T* masters, A* const (&slots)[SLOTS],
                                       const A* clip, const Bits& bits, const Method& method) {
  const A factor = clip ? clip[0] : A(1);
  const long long out = work.outs ? work.outs[piece.tensor] : 0;
  for (int i = 4 * threadIdx.x; i < piece.count; i += 4 * THREADS) {
    const int left = piece.count - i;
    const long long at = piece.at + i;
    const Quad g = load_source(piece.source, piece.begin + i, left);
    Quad p = load(masters + at, left), state[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) state[s] = load(slots[s] + at, left);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      A now[SLOTS];
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) now[s] = state[s].at[e];
      method(p.at[e], g.at[e] * factor, now);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) state[s].at[e] = now[s];
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) store(slots[s] + at, state[s], left);
    store(masters + at, kept(p, bits, unsigned((piece.begin + i) / 4), piece.place, T()), left);
    if (out) store_source(out, piece.begin + i, p, left);
  }
}

// numbers: a row a rate. Each method as its Python class has it; take is 1 - beta.

struct AdamW {
  A take_m, take_v, rate, eps, left;
  __device__ __forceinline__ void operator()(A& p, A g, A (&state)[2]) const {
    state[0] += take_m * (g - state[0]);
    state[1] += take_v * (g * g - state[1]);
    p *= left;
    p -= rate * state[0] / (root(state[1]) + eps);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(adamw)(const __grid_constant__ Work work, T* masters, A* m, A* v,
                const A* numbers,  // (rows, 3): rate, eps, what is left after decay
                const A* clip, const unsigned* step, unsigned key_low, unsigned key_high, A take_m, A take_v) {
  const Piece piece(work);
  const A* now = numbers + 3 * piece.row;
  update(work, piece, masters, {m, v}, clip, {step, key_low, key_high}, AdamW{take_m, take_v, now[0], now[1], now[2]});
}

struct Sgd {
  A momentum, nesterov, rate, left;  // nesterov: 1 or 0
  __device__ __forceinline__ void operator()(A& p, A g, A (&state)[1]) const {
    state[0] = momentum * state[0] + g;
    p *= left;
    p -= rate * (nesterov ? g + momentum * state[0] : state[0]);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(sgd)(const __grid_constant__ Work work, T* masters, A* m,
              const A* numbers,  // (rows, 2): rate, what is left after decay
              const A* clip, const unsigned* step, unsigned key_low, unsigned key_high, A momentum, A nesterov) {
  const Piece piece(work);
  const A* now = numbers + 2 * piece.row;
  update(work, piece, masters, {m}, clip, {step, key_low, key_high}, Sgd{momentum, nesterov, now[0], now[1]});
}

struct Lion {
  A keep, take, take_m, rate, left;  // b1, 1 - b1, 1 - b2
  __device__ __forceinline__ void operator()(A& p, A g, A (&state)[1]) const {
    const A way = keep * state[0] + take * g;
    p *= left;
    p -= rate * (way > A(0) ? A(1) : way < A(0) ? A(-1) : way);  // NaN stays NaN
    state[0] += take_m * (g - state[0]);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(lion)(const __grid_constant__ Work work, T* masters, A* m,
               const A* numbers,  // (rows, 2): rate, what is left after decay
               const A* clip, const unsigned* step, unsigned key_low, unsigned key_high, A keep, A take, A take_m) {
  const Piece piece(work);
  const A* now = numbers + 2 * piece.row;
  update(work, piece, masters, {m}, clip, {step, key_low, key_high}, Lion{keep, take, take_m, now[0], now[1]});
}

struct ScheduleFree {
  A keep, take_v, rate, eps, decay, share;  // keep: b1
  __device__ __forceinline__ void operator()(A& p, A g, A (&state)[3]) const {
    A &v = state[0], &z = state[1], &x = state[2];
    v += take_v * (g * g - v);
    z -= rate * g / (root(v) + eps) + decay * p;
    x += share * (z - x);
    p = z + keep * (x - z);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(schedule_free)(const __grid_constant__ Work work, T* masters, A* v, A* z, A* x,
                        const A* numbers,  // (rows, 4): rate, eps, decay, share of the average
                        const A* clip, const unsigned* step, unsigned key_low, unsigned key_high, A keep, A take_v) {
  const Piece piece(work);
  const A* now = numbers + 4 * piece.row;
  update(work, piece, masters, {v, z, x}, clip, {step, key_low, key_high},
         ScheduleFree{keep, take_v, now[0], now[1], now[2], now[3]});
}

struct Prodigy {
  A scale;  // d / d0
  AdamW adam;
  __device__ __forceinline__ void operator()(A& p, A g, A (&state)[2]) const { adam(p, g * scale, state); }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(prodigy)(const __grid_constant__ Work work, T* masters, A* m, A* v,
                  const A* numbers,  // (rows, 3): rate, rate * decay, rate without any factor
                  const A* clip, const unsigned* step, unsigned key_low, unsigned key_high,
                  const A* d,  // (1), of this step
                  A d0, A take_m, A take_v, A eps) {
  const Piece piece(work);
  const A* now = numbers + 3 * piece.row;
  const A scale = d[0] / d0;
  update(work, piece, masters, {m, v}, clip, {step, key_low, key_high},
         Prodigy{scale, {take_m, take_v, now[0] * d[0], eps * scale, A(1) - now[1] * d[0]}});
}

// s = keep s + weight g, and the chunk's parts of <g, first - p> and of |s|_1. d: (1), of this step.
extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(prodigy_sums)(const __grid_constant__ Work work, const T* masters, A* s, const A* first,
                       A* totals,  // (chunks)
                       A* sizes,   // (chunks)
                       const A* numbers, const A* clip, const A* d, A d0, A keep) {
  const Piece piece(work);
  const A factor = clip ? clip[0] : A(1);
  const A weight = (A(1) - keep) * numbers[2] * (d[0] / d0) * (d[0] / d0);
  A total = A(0), size = A(0);
  for (int i = 4 * threadIdx.x; i < piece.count; i += 4 * THREADS) {
    const int left = piece.count - i;
    const long long at = piece.at + i;
    const Quad g = load_source(piece.source, piece.begin + i, left), p = load(masters + at, left);
    const Quad from = load(first + at, left);
    Quad sum = load(s + at, left);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const A own = g.at[e] * factor;
      total += own * (from.at[e] - p.at[e]);
      sum.at[e] = keep * sum.at[e] + weight * own;
      size += sum.at[e] < A(0) ? -sum.at[e] : sum.at[e];
    }
    store(s + at, sum, left);
  }
  total = block_sum<THREADS>(total);
  size = block_sum<THREADS>(size);
  if (threadIdx.x == 0) {
    totals[piece.chunk] = total;
    sizes[piece.chunk] = size;
  }
}

__device__ A sum_of(const A* partial, int count) {
  A sum = A(0);
  for (int i = threadIdx.x; i < count; i += FINISH) sum += partial[i];
  return block_sum<FINISH>(sum);
}

// The numerator and the next d, each (1); this step's own d is left in d_now. One block.
extern "C" __global__ void __launch_bounds__(FINISH)
    NAME(prodigy_estimate)(const A* totals, const A* sizes,  // (count)
                           int count, const A* numbers, A* numerator, A* d, A* d_now, A d0, A d_coef, A keep) {
  const A total = sum_of(totals, count), size = sum_of(sizes, count);
  if (threadIdx.x) return;
  const A now = d[0], weight = (A(1) - keep) * numbers[2] * (now / d0) * (now / d0);
  const A found = keep * numerator[0] + weight * total;
  // No gradient at all yet tells nothing: 0 / 0 would stay for ever.
  const A next = d_coef * found / (size > A(0) ? size : A(1));
  numerator[0] = found;
  d_now[0] = now;
  d[0] = next <= now ? now : next;  // NaN stays NaN
}

// The chunk's sum of squared gradients.
extern "C" __global__ void __launch_bounds__(THREADS) NAME(squares)(const __grid_constant__ Work work,
                                                                    A* partial) {  // (chunks)
  const Piece piece(work);
  A sum = A(0);
  for (int i = 4 * threadIdx.x; i < piece.count; i += 4 * THREADS) {
    const Quad g = load_source(piece.source, piece.begin + i, piece.count - i);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum += g.at[e] * g.at[e];
  }
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) partial[piece.chunk] = sum;
}

// The norm, and what brings it within the bound, each (1). One block.
extern "C" __global__ void __launch_bounds__(FINISH) NAME(norm_bound)(const A* partial,  // (count)
                                                                      int count, A bound, A* norm, A* factor) {
  const A found = root(sum_of(partial, count));
  if (threadIdx.x) return;
  norm[0] = found;
  factor[0] = found <= bound ? A(1) : bound / found;  // NaN stays NaN
}

// value += share * (source - pull * value) of a flat buffer: an average that moves with pull 1, a sum with pull 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(approach)(const __grid_constant__ Work work, A* values, A share, A pull) {
  const Piece piece(work);
  for (int i = 4 * threadIdx.x; i < piece.count; i += 4 * THREADS) {
    const int left = piece.count - i;
    const Quad source = load_source(piece.source, piece.begin + i, left);
    Quad value = load(values + piece.at + i, left);
#pragma unroll
    for (int e = 0; e < 4; ++e) value.at[e] += share * (source.at[e] - pull * value.at[e]);
    store(values + piece.at + i, value, left);
  }
}

// What the host tells: `count` numbers, and the step. One block.
extern "C" __global__ void __launch_bounds__(NUMBERS)
    NAME(tell)(const __grid_constant__ Numbers told, int count, A* numbers, unsigned* clock, unsigned step) {
  const int i = threadIdx.x;
  if (i < count) numbers[i] = A(told.at[i]);
  if (i == 0) clock[0] = step;
}
