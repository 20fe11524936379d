// Parts of decoded pictures: planes of luma and chroma (4:2:0) cut, mirrored and made RGB.

#pragma once

#include <cstdint>

namespace avmae {

// One plane of a picture; its lines are `line` bytes apart.
struct Plane {
  const uint8_t* data;
  int64_t line;
};

struct Planes {
  Plane y, u, v;
};

// The rectangle that is wanted, in pixels of the picture; mirrored left to right if so.
struct Crop {
  int64_t top, left, height, width;
  bool mirrored;
};

// In 2**-16 of a level, `black` in levels: see avmae_kernels/yuv.py, which defines the conversion.
struct Coefficients {
  int32_t black, luma, v_red, u_green, v_green, u_blue;
};

// out: [height, width, 3], contiguous. A pixel takes the chroma of its 2x2 block.
void crop_to_rgb(const Planes& planes, const Crop& crop, const Coefficients& by, uint8_t* out);

// out: [3 height / 2, width], contiguous, luma above U above V. All of `crop` must be even. Planes of
// the full range of levels are brought to the limited one.
void crop_to_i420(const Planes& planes, const Crop& crop, bool full, uint8_t* out);

}  // namespace avmae
