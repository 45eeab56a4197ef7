// Work on many arrays in one launch. What is kept between steps lies in flat buffers, an array behind the other; what
// comes new in every step, the sources, lies anywhere. A block takes one chunk of one array, a thread four values at a
// time.
#pragma once
#include "philox.cuh"
#include "types.cuh"

constexpr int THREADS = 256, CHUNK = 2048, SOURCES = 480;

// What a launch is over. The pointers to the sources are in it, by value: that needs no upload and so no wait, and a
// captured graph keeps them. 4096 bytes are all that a launch may pass.
struct Work {
  const long long* tensors;  // (all, 4): first element in the flat buffers, elements, row of numbers, place of bits
  const int* chunks;         // (all, 2): array, first element / CHUNK
  const long long* outs;     // (all): pointers as in sources, to where the values go as well; or null
  int first_tensor, first_chunk;
  long long sources[SOURCES];  // of the arrays from first_tensor on. An odd one is of bf16 and one less, others of A
};

static_assert(sizeof(Work) == 32 + 8 * SOURCES, "the host packs it without gaps");

// The chunk of this block.
struct Piece {
  int tensor, chunk, row, count;  // count: elements
  unsigned place;
  long long begin;  // of its first element in its array
  long long at;     // the same in the flat buffers
  long long source;

  __device__ __forceinline__ explicit Piece(const Work& work) {
    chunk = work.first_chunk + blockIdx.x;
    tensor = work.chunks[2 * chunk];
    begin = (long long)work.chunks[2 * chunk + 1] * CHUNK;
    const long long* told = work.tensors + 4ll * tensor;
    at = told[0] + begin;
    const long long left = told[1] - begin;
    count = left < CHUNK ? int(left) : CHUNK;
    row = int(told[2]);
    place = unsigned(told[3]);
    source = work.sources[tensor - work.first_tensor];
  }
};

using Quad = Pack<A, 4>;

template <class E>
__device__ __forceinline__ bool aligned(const E* at) {
  return reinterpret_cast<unsigned long long>(at) % sizeof(Pack<E, 4>) == 0;
}

// Four values, of which the array holds `left`; the others are 0.
template <class E>
__device__ __forceinline__ Quad load(const E* from, int left) {
  Quad out;
  if (left >= 4 && aligned(from)) {
    const Pack<E, 4> whole = *reinterpret_cast<const Pack<E, 4>*>(from);
#pragma unroll
    for (int e = 0; e < 4; ++e) out.at[e] = A(widen(whole.at[e]));
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) out.at[e] = e < left ? A(widen(from[e])) : A(0);
  }
  return out;
}

template <class E>
__device__ __forceinline__ void store(E* to, const Pack<E, 4>& values, int left) {
  if (left >= 4 && aligned(to)) {
    *reinterpret_cast<Pack<E, 4>*>(to) = values;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < left) to[e] = values.at[e];
  }
}

// Four values of a source, or into it, from its element `at` on.
__device__ __forceinline__ Quad load_source(long long source, long long at, int left) {
  if (source & 1) return load(reinterpret_cast<const bf16*>(source - 1) + at, left);
  return load(reinterpret_cast<const A*>(source) + at, left);
}

__device__ __forceinline__ void store_source(long long source, long long at, const Quad& values, int left) {
  if (source & 1) {
    Pack<bf16, 4> narrowed;
#pragma unroll
    for (int e = 0; e < 4; ++e) narrowed.at[e] = round<bf16>(float(values.at[e]));
    store(reinterpret_cast<bf16*>(source - 1) + at, narrowed, left);
  } else {
    store(reinterpret_cast<A*>(source) + at, values, left);
  }
}

// bf16 of four values, up with the probability of the share that is left. The carry out of the 16 bits that go is the
// rounding; in a NaN it could reach the sign.
__device__ __forceinline__ Pack<bf16, 4> round_stochastically(const Quad& values, const Words& noise) {
  Pack<bf16, 4> out;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float value = float(values.at[e]);
    const unsigned bits = __float_as_uint(value);
    const unsigned up = value == value ? (bits + (noise.at[e] & 0xFFFFu)) >> 16 : (bits >> 16) | 0x40u;
    out.at[e].bits = static_cast<unsigned short>(up);
  }
  return out;
}

// The sum of `value` over a block of `threads` in every thread; the order of the sum is fixed.
template <int threads>
__device__ A block_sum(A value) {
  __shared__ A warps[threads / 32];
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  A total = A(0);
  for (int w = 0; w < threads / 32; ++w) total += warps[w];
  return total;
}
