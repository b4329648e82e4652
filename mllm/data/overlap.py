"""Pictures that look alike: a perceptual hash, and pairs of two sets by it.

The hash keeps when a picture is scaled, recompressed or slightly brightened; not when it is cropped or turned. On 300
pictures of a real set, half the size and JPEG of quality 50 changed at most FAR bits in 19 of 20. Drawings of one
kind (forms, blocks on white) may be as near without being the same: pairs are to be looked at.

N pictures of ours.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image

SIDE = 8
NOISE = 4  # of 255, by which a place must be brighter than its neighbour: flat places differ by less once recompressed
FAR = 5  # bits of 128 that may differ
COLOUR = 10  # of 255, by which a channel's mean may differ


def picture_hash(image: Image.Image) -> bytes:
    """19 bytes: for 8 x 8 places whether it grows brighter to the right and downwards, and the mean colour."""
    small = image.convert("RGB").resize((SIDE + 1, SIDE + 1), Image.Resampling.BOX)
    grey = np.asarray(small.convert("L"), dtype=np.int16)
    rises = [grey[:-1, 1:] > grey[:-1, :-1] + NOISE, grey[1:, :-1] > grey[:-1, :-1] + NOISE]
    mean = np.asarray(small).reshape(-1, 3).mean(0).round().astype(np.uint8)
    return np.packbits(rises).tobytes() + mean.tobytes()


def overlap(ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Pairs (one of ours, one of theirs), by name, of pictures that look the same."""
    if not ours:
        return []
    names = list(ours)
    bytes_N = np.frombuffer(b"".join(ours.values()), np.uint8).reshape(len(names), -1)
    bits_N, colours_N = bytes_N[:, :-3], bytes_N[:, -3:].astype(np.int16)
    pairs = []
    for name, value in theirs.items():
        one = np.frombuffer(value, np.uint8)
        is_near_N = np.bitwise_count(bits_N ^ one[:-3]).sum(1) <= FAR
        is_near_N &= (np.abs(colours_N - one[-3:]) <= COLOUR).all(1)
        pairs += [(names[k], name) for k in np.flatnonzero(is_near_N)]
    return sorted(pairs)
