// Stochastic rounding of f32 to bf16, with the bits of a step's tensor.
// variants bf16: none
#include "multi_tensor.cuh"

// A thread rounds four values. step: (1), on the device, so that a captured graph draws anew.
extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(round_stochastically)(const A* x, T* out, long long n, const unsigned* step, unsigned tensor, unsigned key_low,
                               unsigned key_high) {
  const long long at = 4 * (blockIdx.x * (long long)THREADS + threadIdx.x);
  if (at >= n) return;
  const int left = n - at < 4 ? int(n - at) : 4;
  const Words noise = random_words(unsigned(at / 4), tensor, step[0], key_low, key_high);
  store(out + at, round_stochastically(load(x + at, left), noise), left);
}
