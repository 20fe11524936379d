// The JPEGs that `avmae pack` writes, as planes: baseline, 8 bits, 4:2:0, one scan, no restarts.

#pragma once

#include <cstddef>
#include <cstdint>

namespace avmae {

// Blocks are decoded in rows of eight units of 16 x 16 pixels: luma has lines of a multiple of 128
// bytes and whole units of lines, chroma half of both.
struct JpegPlanes {
  uint8_t *y, *u, *v;
  int64_t y_line, c_line;
};

// Whether a JPEG of this size was decoded whole. Where it is damaged or of another size or kind,
// `out` holds anything, and a decoder of all kinds has to say what is the matter.
bool decode_jpeg(const uint8_t* data, size_t bytes, int64_t height, int64_t width,
                 const JpegPlanes& out);

}  // namespace avmae
