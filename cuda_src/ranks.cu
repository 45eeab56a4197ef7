// A mask over ranks that depends on a noise level: the noisier the sample, the fewer ranks act.
#include "types.cuh"

__device__ __forceinline__ float power_of(float base, float exponent) {
  return powf(base, exponent);
}
__device__ __forceinline__ double power_of(double base, double exponent) {
  return pow(base, exponent);
}

// out[n][.][p] = x[n][.][p] if p / width < least + floor((1 - level[n])^exponent * (ranks - least)), else 0. Grid
// (shares of the rows of a sample, samples); all rows are one sample where there is one level.
extern "C" __global__ void __launch_bounds__(256)
    NAME(mask_ranks)(const T* x,      // (samples, rows, ranks * width)
                     const A* level,  // (samples)
                     T* out, long long rows, int ranks, int width, int least, A exponent) {
  const int columns = ranks * width;
  const A clear = A(1) - level[blockIdx.y];
  const int active = least + int(power_of(clear > A(0) ? clear : A(0), exponent) * A(ranks - least));
  const long long start = blockIdx.y * rows * columns;
  for (long long i = blockIdx.x * 256LL + threadIdx.x; i < rows * columns; i += gridDim.x * 256LL)
    out[start + i] = int(i % columns) / width < active ? x[start + i] : narrow(A(0));
}
