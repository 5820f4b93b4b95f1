"""The canonical sum of docs/quantizer.md in numpy, for tests of operators and of training alike."""

import numpy as np


@np.errstate(all="ignore")
def abs_sums(w: np.ndarray, group_len: int) -> np.ndarray:
    """Sums of |w| of each group of float32 [O, I]: 64 lanes in turn, then pairs of lanes."""
    x = np.abs(w).reshape(w.shape[0], -1, group_len)
    x = np.pad(x, ((0, 0), (0, 0), (0, -group_len % 64)))
    lanes = np.zeros((*x.shape[:2], 64), np.float32)
    for k in range(0, x.shape[2], 64):
        lanes = lanes + x[:, :, k : k + 64]
    while lanes.shape[2] > 1:
        lanes = lanes[:, :, ::2] + lanes[:, :, 1::2]
    return lanes[:, :, 0]


def row_sums(w: np.ndarray, slices: int = 1) -> np.ndarray:
    """Sums of |w| of each row, [O]: those of equal slices of the inputs, added from the first."""
    first, *rest = (abs_sums(part, part.shape[1])[:, 0] for part in np.split(w, slices, axis=1))
    return sum(rest, start=first)
