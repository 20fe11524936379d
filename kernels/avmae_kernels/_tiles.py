"""Block sizes: how a row of a tensor is cut into tiles that a kernel reads in 128-bit accesses."""

# Below this a block would leave most lanes of a warp without work.
_SMALLEST = 32


def column_block(columns: int, largest: int) -> int:
    """The block to cut `columns` into, a power of two, at most `largest`.

    The largest one that divides `columns`, so that no lane is idle and no access needs a mask
    (768 = 3 * 256, 1536 = 3 * 512); where that is tiny, one that leaves a masked rest.
    """
    dividing = min(columns & -columns, largest)
    if dividing >= _SMALLEST:
        return dividing
    return min(largest, max(_SMALLEST, 1 << (columns - 1).bit_length()))
