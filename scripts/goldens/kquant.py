"""Quantisers for the K types that the gguf package can only read: plain, not good. Any valid bytes do, for the golden is what
gguf.quants.dequantize says of them."""

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants

SUPER = 256


def quantize(data: np.ndarray, kind: T) -> np.ndarray:
    """Bytes of `data` [..., K] in the block format of `kind`, [..., K / block * block bytes]."""
    own = {T.Q4_K: _q4_k, T.Q5_K: _q5_k, T.Q6_K: _q6_k}.get(kind)
    if own is None:
        return quants.quantize(data.astype(np.float32), kind)
    blocks = own(data.astype(np.float32).reshape(-1, SUPER))
    return blocks.reshape(*data.shape[:-1], -1)


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _scales_and_minima(x: np.ndarray, levels: int):
    """The part that Q4_K and Q5_K share: eight sub-groups of 32 with a 6-bit scale and a 6-bit minimum each."""
    groups = x.reshape(-1, 8, 32)
    low = np.minimum(groups.min(-1), 0.0)
    step = (groups.max(-1) - low) / levels
    d = (step.max(-1) / 63).astype(np.float16)
    dmin = ((-low).max(-1) / 63).astype(np.float16)

    def six_bits(value, unit):
        unit = unit.astype(np.float32)[:, None]
        return np.clip(np.rint(np.divide(value, unit, out=np.zeros_like(value), where=unit > 0)), 0, 63).astype(np.uint8)

    sc, m = six_bits(step, d), six_bits(-low, dmin)
    scale = d.astype(np.float32)[:, None] * sc
    minimum = dmin.astype(np.float32)[:, None] * m
    q = np.divide(groups + minimum[..., None], scale[..., None], out=np.zeros_like(groups), where=scale[..., None] > 0)
    q = np.clip(np.rint(q), 0, levels).astype(np.uint8)
    packed = np.concatenate([
        (sc[:, :4] & 63) | ((sc[:, 4:] >> 4) << 6),
        (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6),
        (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
    ], axis=1)
    return np.concatenate([_half(d), _half(dmin), packed], axis=1), q


def _nibbles(q: np.ndarray) -> np.ndarray:
    """[n, 8, 32] of four bits to 128 bytes: sub-group 2i in the low halves of 32 bytes, 2i + 1 in the high halves."""
    return (q[:, 0::2] | (q[:, 1::2] << 4)).reshape(len(q), 128)


def _q4_k(x: np.ndarray) -> np.ndarray:
    head, q = _scales_and_minima(x, 15)
    return np.concatenate([head, _nibbles(q)], axis=1)


def _q5_k(x: np.ndarray) -> np.ndarray:
    head, q = _scales_and_minima(x, 31)
    fifth = np.bitwise_or.reduce((q >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    return np.concatenate([head, fifth, _nibbles(q & 15)], axis=1)


def _q6_k(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(-1, 16, 16)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    step = -peak / 32
    d = (np.abs(step).max(-1) / 127).astype(np.float16)
    unit = d.astype(np.float32)[:, None]
    sc = np.clip(np.rint(np.divide(step, unit, out=np.zeros_like(step), where=unit > 0)), -127, 127).astype(np.int8)
    scale = (unit * sc)[..., None]
    q = np.divide(groups, scale, out=np.zeros_like(groups), where=scale != 0)
    q = (np.clip(np.rint(q), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # half, quarter, lane
    low = np.concatenate([(q[:, :, 0] & 15) | ((q[:, :, 2] & 15) << 4), (q[:, :, 1] & 15) | ((q[:, :, 3] & 15) << 4)], axis=-1)
    high = (q[:, :, 0] >> 4) | ((q[:, :, 1] >> 4) << 2) | ((q[:, :, 2] >> 4) << 4) | ((q[:, :, 3] >> 4) << 6)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), sc.view(np.uint8), _half(d)], axis=1)
