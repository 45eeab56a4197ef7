// Functions of a real number in the accumulator type: one name for float and double. NVRTC's full-precision versions.
#pragma once

__device__ __forceinline__ float exponential(float x) {
  return expf(x);
}
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}
__device__ __forceinline__ float logarithm(float x) {
  return logf(x);
}
__device__ __forceinline__ double logarithm(double x) {
  return log(x);
}
__device__ __forceinline__ float root(float x) {
  return sqrtf(x);
}
__device__ __forceinline__ double root(double x) {
  return sqrt(x);
}
// The share of a standard normal distribution below x; exact to its last digits in both tails.
__device__ __forceinline__ float normal_below(float x) {
  return normcdff(x);
}
__device__ __forceinline__ double normal_below(double x) {
  return normcdf(x);
}
