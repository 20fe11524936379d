"""JPEGs of one kind and size, as planes: what `avmae pack --codec mjpeg` writes.

Baseline, 8 bits, chroma at half the sides, one scan without restarts. A window is 16 of them, so a
general decoder's work for each (its tables, its colour conversion, its output in pixels that the
crop leaves out) is most of the time a sample takes. Chroma is not interpolated and the planes are
of full-range BT.601: `avmae_kernels.yuv_crop.crop_to_rgb` with `bt601-full` makes pixels of them.

Computed by `avmae_kernels._C` (`csrc/jpeg.cpp`) alone. Whatever that leaves is for a library.
"""

import numpy as np

from avmae_kernels._compiled import compiled
from avmae_kernels.yuv_crop import Planes

# Decoded at a time; see `csrc/jpeg.h`.
_LINES, _COLUMNS = 16, 128


class JpegDecoder:
    """Decodes JPEGs of `height` x `width` pixels into memory that it uses again and again."""

    def __init__(self, height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"JpegDecoder wants sides from 1 on, got {height} x {width}")
        self._size = height, width
        lines, columns = -(-height // _LINES) * _LINES, -(-width // _COLUMNS) * _COLUMNS
        chroma = lines // 2, columns // 2
        self._memory = tuple(np.empty(s, np.uint8) for s in ((lines, columns), chroma, chroma))
        half = slice(0, (height + 1) // 2), slice(0, (width + 1) // 2)
        y, u, v = self._memory
        self._planes: Planes = y[:height, :width], u[half], v[half]

    def decode(self, data: bytes) -> Planes | None:
        """Y [H, W], U and V [(H + 1) // 2, (W + 1) // 2], which hold until the next call.

        None where `csrc/` is not built, or the JPEG is damaged, or of another size or kind.
        """
        module = compiled()
        if module is None or not module.decode_jpeg(data, *self._size, *self._memory):
            return None
        return self._planes
