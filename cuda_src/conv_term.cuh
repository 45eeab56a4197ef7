// What a convolution sums, for which columns: a term or, in conv_extended.cu, two.
#pragma once
#include "conv_walk.cuh"

// A sum over taps and channels but for its arrays: blocks of channels, each read for a block of the result's columns.
struct Term {
  int inner, outer;  // channels and columns a block
  int blocks;
  int shared;  // all blocks have one w
  int single;  // one tap, at the position itself
};

// Its arrays, and the sum that goes before it, if there is one.
struct Sources {
  const T *in, *w;
  Term own;
  const T *in2, *w2;
  Term other;
};
