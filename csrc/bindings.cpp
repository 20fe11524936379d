// avmae_kernels._C: NumPy arrays in and out, the GIL released while the numbers are made.
//
// avmae_kernels/masking.py, yuv_crop.py and jpeg.py are the public faces and check what users pass;
// here only what would read or write out of bounds is checked again.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "jpeg.h"
#include "masks.h"
#include "permutation.h"
#include "philox.h"
#include "pictures.h"

namespace py = pybind11;

namespace avmae {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

MaskKind kind_from_name(const std::string& name) {
  static const std::map<std::string, MaskKind> kinds = {
      {"random", MaskKind::kRandom},       {"tube", MaskKind::kTube},
      {"block", MaskKind::kBlock},         {"time", MaskKind::kTime},
      {"frequency", MaskKind::kFrequency}, {"time_frequency", MaskKind::kTimeFrequency},
  };
  const auto found = kinds.find(name);
  require(found != kinds.end(), "kind: unknown");
  return found->second;
}

std::tuple<Array<int32_t>, Array<int32_t>, Array<int32_t>> py_sample_masks(
    const std::string& kind, const std::array<int64_t, 3>& grid, int64_t masked_units,
    int64_t masked_columns, const Array<int64_t>& keys, uint64_t seed, uint32_t stream) {
  const MaskPlan plan{kind_from_name(kind), grid, masked_units, masked_columns};
  check(plan);
  require(keys.ndim() == 1, "keys: must have one axis");
  const int64_t batch = keys.shape(0), tokens = plan.tokens();
  const int64_t masked_count = plan.masked_tokens(), visible_count = tokens - masked_count;
  // Three views of one allocation: of three, glibc hands the pages back to the kernel batch after
  // batch, and faulting them in again takes longer than drawing the masks.
  Array<int32_t> lists(2 * batch * tokens);
  int32_t* visible = lists.mutable_data();
  int32_t* masked = visible + batch * visible_count;
  int32_t* inverse = masked + batch * masked_count;
  const int64_t* keys_data = keys.data();
  {
    py::gil_scoped_release release;
    sample_masks(plan, keys_data, batch, seed, stream, visible, masked, inverse);
  }
  return {Array<int32_t>({batch, visible_count}, visible, lists),
          Array<int32_t>({batch, masked_count}, masked, lists),
          Array<int32_t>({batch, tokens}, inverse, lists)};
}

Array<uint32_t> py_philox(const Array<uint32_t>& counters, const Array<uint32_t>& keys) {
  require(counters.ndim() == 2 && counters.shape(1) == 4, "counters: must be [M, 4]");
  require(keys.ndim() == 2 && keys.shape(1) == 2 && keys.shape(0) == counters.shape(0),
          "keys: must be [M, 2]");
  const int64_t rows = counters.shape(0);
  Array<uint32_t> out({rows, int64_t{4}});
  const uint32_t *counter = counters.data(), *key = keys.data();
  uint32_t* words = out.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t row = 0; row < rows; ++row) {
      const uint32_t* c = counter + 4 * row;
      const Block block = philox({c[0], c[1], c[2], c[3]}, key[2 * row], key[2 * row + 1]);
      std::copy(block.begin(), block.end(), words + 4 * row);
    }
  }
  return out;
}

Array<int64_t> py_permute(const Array<int64_t>& indices, int64_t n, uint64_t seed, int64_t key) {
  require(n >= 1 && n <= int64_t{1} << 40, "n: must lie between 1 and 2**40");
  require(indices.ndim() == 1, "indices: must have one axis");
  const int64_t count = indices.shape(0);
  Array<int64_t> out(count);
  const int64_t* in_data = indices.data();
  int64_t* out_data = out.mutable_data();
  {
    py::gil_scoped_release release;
    const KeyedPermutation permutation(static_cast<uint64_t>(n), seed, key);
    for (int64_t i = 0; i < count; ++i) {
      // An index outside the domain could walk for ever.
      require(in_data[i] >= 0 && in_data[i] < n, "indices: must lie in [0, n)");
      out_data[i] = static_cast<int64_t>(permutation(static_cast<uint64_t>(in_data[i])));
    }
  }
  return out;
}

Array<double> py_keyed_uniform(uint64_t seed, const Array<int64_t>& keys, uint32_t stream,
                               int64_t count) {
  require(keys.ndim() == 1 && count >= 0, "keys: must have one axis; count: at least 0");
  const int64_t batch = keys.shape(0);
  Array<double> out({batch, count});
  const int64_t* keys_data = keys.data();
  double* out_data = out.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t row = 0; row < batch; ++row) {
      const Draws draws(seed, Purpose::kUniform, stream, keys_data[row]);
      for (int64_t i = 0; i < count; ++i) {
        const Block words = draws.block(static_cast<uint32_t>(i / 2));
        const uint64_t bits = uint64_t{words[i % 2 * 2 + 1]} << 32 | words[i % 2 * 2];
        // 53 bits are all a double in [0, 1) can tell apart; the product is exact.
        *out_data++ = static_cast<double>(bits >> 11) * 0x1p-53;
      }
    }
  }
  return out;
}

Array<int64_t> py_keyed_integers(uint64_t seed, const Array<int64_t>& keys, uint32_t stream,
                                 int64_t count, const Array<int64_t>& highs) {
  require(keys.ndim() == 1 && count >= 0, "keys: must have one axis; count: at least 0");
  require(highs.ndim() == 1 && highs.shape(0) == keys.shape(0), "highs: must be as long as keys");
  const int64_t batch = keys.shape(0);
  Array<int64_t> out({batch, count});
  const int64_t *keys_data = keys.data(), *highs_data = highs.data();
  int64_t* out_data = out.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t high = highs_data[row];
      require(high >= 1 && high <= int64_t{1} << 32, "high: must lie between 1 and 2**32");
      const Draws draws(seed, Purpose::kIntegers, stream, keys_data[row]);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t index = static_cast<uint32_t>(i);
        const uint32_t word = draws.block(index / 4)[index % 4];
        *out_data++ = draws.bounded(word, index, static_cast<uint64_t>(high));
      }
    }
  }
  return out;
}

// A picture's lines may be padded, so it is no contiguous array.
using Lines = py::array_t<uint8_t, 0>;
using Pixels = Array<uint8_t>;

Plane plane_of(const Lines& lines) {
  return {lines.data(), static_cast<int64_t>(lines.strides(0))};
}

Planes planes_of(const Lines& y, const Lines& u, const Lines& v, const Crop& crop) {
  require(y.ndim() == 2 && u.ndim() == 2 && v.ndim() == 2, "planes: must have two axes");
  const int64_t height = y.shape(0), width = y.shape(1);
  for (const Lines* plane : {&y, &u, &v}) {
    const bool luma = plane == &y;
    require(plane->shape(0) == (luma ? height : (height + 1) / 2), "planes: must fit together");
    require(plane->shape(1) == (luma ? width : (width + 1) / 2), "planes: must fit together");
    require(plane->strides(1) == 1 || plane->shape(1) == 1, "planes: must have lines of bytes");
  }
  const bool inside = crop.top >= 0 && crop.top <= height - crop.height && crop.left >= 0 &&
                      crop.left <= width - crop.width;
  require(inside, "crop: must lie inside the picture");
  return {plane_of(y), plane_of(u), plane_of(v)};
}

void py_crop_to_rgb(Pixels& out, const Lines& y, const Lines& u, const Lines& v, int64_t top,
                    int64_t left, bool mirrored, const std::array<int32_t, 6>& by) {
  require(out.ndim() == 3 && out.shape(2) == 3, "out: must be [h, w, 3]");
  const Crop crop{top, left, out.shape(0), out.shape(1), mirrored};
  const Planes planes = planes_of(y, u, v, crop);
  uint8_t* pixels = out.mutable_data();
  py::gil_scoped_release release;
  crop_to_rgb(planes, crop, {by[0], by[1], by[2], by[3], by[4], by[5]}, pixels);
}

void py_crop_to_i420(Pixels& out, const Lines& y, const Lines& u, const Lines& v, int64_t top,
                     int64_t left, bool mirrored, bool full) {
  require(out.ndim() == 2 && out.shape(0) % 3 == 0, "out: must be [3h/2, w]");
  const Crop crop{top, left, out.shape(0) / 3 * 2, out.shape(1), mirrored};
  require((top | left | crop.height | crop.width) % 2 == 0, "crop: must be even");
  const Planes planes = planes_of(y, u, v, crop);
  uint8_t* bytes = out.mutable_data();
  py::gil_scoped_release release;
  crop_to_i420(planes, crop, full, bytes);
}

bool py_decode_jpeg(const py::bytes& data, int64_t height, int64_t width, Pixels& y, Pixels& u,
                    Pixels& v) {
  const auto whole = [](int64_t side, int64_t unit) { return (side + unit - 1) / unit * unit; };
  require(height >= 1 && width >= 1, "size: must be at least 1 x 1");
  require(y.ndim() == 2 && y.shape(0) >= whole(height, 16) && y.shape(1) >= whole(width, 128),
          "y: must hold whole units");
  for (const Pixels* chroma : {&u, &v})
    require(chroma->ndim() == 2 && chroma->shape(0) >= whole(height, 16) / 2 &&
                chroma->shape(1) >= whole(width, 128) / 2 && chroma->shape(1) == u.shape(1),
            "u, v: must hold whole units");
  const JpegPlanes out{y.mutable_data(), u.mutable_data(), v.mutable_data(), y.shape(1),
                       u.shape(1)};
  char* bytes = nullptr;
  Py_ssize_t count = 0;
  if (PyBytes_AsStringAndSize(data.ptr(), &bytes, &count) != 0) throw py::error_already_set();
  py::gil_scoped_release release;
  return decode_jpeg(reinterpret_cast<const uint8_t*>(bytes), static_cast<size_t>(count), height,
                     width, out);
}

}  // namespace
}  // namespace avmae

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled parts of avmae_kernels.masking, yuv_crop and jpeg; use those.";
  module.def("sample_masks", &avmae::py_sample_masks, py::arg("kind"), py::arg("grid"),
             py::arg("masked_units"), py::arg("masked_columns"), py::arg("keys").noconvert(),
             py::arg("seed"), py::arg("stream"));
  module.def("philox", &avmae::py_philox, py::arg("counters").noconvert(),
             py::arg("keys").noconvert());
  module.def("permute", &avmae::py_permute, py::arg("indices").noconvert(), py::arg("n"),
             py::arg("seed"), py::arg("key"));
  module.def("keyed_uniform", &avmae::py_keyed_uniform, py::arg("seed"),
             py::arg("keys").noconvert(), py::arg("stream"), py::arg("count"));
  module.def("keyed_integers", &avmae::py_keyed_integers, py::arg("seed"),
             py::arg("keys").noconvert(), py::arg("stream"), py::arg("count"),
             py::arg("highs").noconvert());
  module.def("crop_to_rgb", &avmae::py_crop_to_rgb, py::arg("out").noconvert(),
             py::arg("y").noconvert(), py::arg("u").noconvert(), py::arg("v").noconvert(),
             py::arg("top"), py::arg("left"), py::arg("mirrored"), py::arg("coefficients"));
  module.def("crop_to_i420", &avmae::py_crop_to_i420, py::arg("out").noconvert(),
             py::arg("y").noconvert(), py::arg("u").noconvert(), py::arg("v").noconvert(),
             py::arg("top"), py::arg("left"), py::arg("mirrored"), py::arg("full"));
  module.def("decode_jpeg", &avmae::py_decode_jpeg, py::arg("data"), py::arg("height"),
             py::arg("width"), py::arg("y").noconvert(), py::arg("u").noconvert(),
             py::arg("v").noconvert());
  // avmae_kernels/_compiled.py asks for this very number.
  module.attr("VERSION") = 2;
}
