// Dropout in one pass: nothing of the mask is stored, the gradient draws it again from the same numbers.
//
// Mask entry m is word m % 4 of the Philox counter (m / 4, tensor, step, kind); it is 1 where that word is `threshold`
// or more.
#include "types.cuh"
#include "philox.cuh"

__device__ __forceinline__ Words drawn(long long entry, unsigned tensor, unsigned step, unsigned kind, unsigned key_low,
                                       unsigned key_high) {
  return philox4x32({{unsigned(entry / 4), tensor, step, kind}}, key_low, key_high);
}

// out = add + keep * factor * x, the elements seen as (outer, entries, inner) with one mask entry for each of the
// middle axis. A thread takes four elements in a row: with inner = 1 one counter serves them all, and `packed`
// (aligned, n % 4 == 0) moves them as one.
extern "C" __global__ void __launch_bounds__(256)
    NAME(dropout)(const T* x, const T* add,  // (n); add may be null
                  const unsigned int* step,  // (1)
                  const A* gain,             // (1), or null for `factor`
                  T* out, long long n, long long entries, long long inner, unsigned int threshold, unsigned int key_low,
                  unsigned int key_high, unsigned int tensor, unsigned int kind, const A factor, int packed) {
  const unsigned now = step[0];
  const A by = gain ? gain[0] : factor;
  const long long stride = gridDim.x * 1024LL;
  for (long long first = (blockIdx.x * 256LL + threadIdx.x) * 4; first < n; first += stride) {
    const int count = n - first < 4 ? int(n - first) : 4;
    Pack<T, 4> seen, base, made;
    if (packed) {
      seen = *reinterpret_cast<const Pack<T, 4>*>(x + first);
      if (add) base = *reinterpret_cast<const Pack<T, 4>*>(add + first);
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (j < count) {
          seen.at[j] = x[first + j];
          if (add) base.at[j] = add[first + j];
        }
    }
    const long long row = first / inner;
    long long entry = row % entries, within = first - row * inner, block = entry / 4;
    Words words = drawn(entry, tensor, now, kind, key_low, key_high);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j >= count) continue;
      if (entry / 4 != block) {
        block = entry / 4;
        words = drawn(entry, tensor, now, kind, key_low, key_high);
      }
      // A choice of registers: an index that only the run knows would send them to memory.
      const int lane = int(entry % 4);
      const unsigned low = lane & 1 ? words.at[1] : words.at[0], high = lane & 1 ? words.at[3] : words.at[2];
      const bool keep = (lane & 2 ? high : low) >= threshold;
      const A value = keep ? widen(seen.at[j]) * by : A(0);
      made.at[j] = narrow(add ? widen(base.at[j]) + value : value);
      if (++within == inner) {
        within = 0;
        if (++entry == entries) entry = 0;
      }
    }
    if (packed) {
      *reinterpret_cast<Pack<T, 4>*>(out + first) = made;
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (j < count) out[first + j] = made.at[j];
    }
  }
}

// gain = entries / how many of them the same numbers keep; 0 where they keep none. One block.
extern "C" __global__ void __launch_bounds__(256)
    NAME(kept_gain)(const unsigned int* step,  // (1)
                    A* gain,                   // (1)
                    long long entries, unsigned int threshold, unsigned int key_low, unsigned int key_high,
                    unsigned int tensor, unsigned int kind) {
  __shared__ int kept[256];
  int mine = 0;
  for (long long block = threadIdx.x; block * 4 < entries; block += 256) {
    const Words words = drawn(block * 4, tensor, step[0], kind, key_low, key_high);
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (block * 4 + j < entries) mine += words.at[j] >= threshold;
  }
  kept[threadIdx.x] = mine;
  for (int half = 128; half; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) kept[threadIdx.x] += kept[threadIdx.x + half];
  }
  if (threadIdx.x == 0) gain[0] = kept[0] ? A(entries) / A(kept[0]) : A(0);
}
