"""FLOPs of transformer layers, and the length at which attention takes over: arithmetic, no torch.

>>> gemma = Shape(width=2048, query=2048, key_value=256, feed_forward=16384)
>>> round(sum(layer_flops(gemma, 1024)) / 1e9, 2), tipping_point(gemma)
(234.08, 26880.0)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mutor.config.schema import Shape

# dense bfloat16 FLOP/s as their makers state them, by a part of the device's name
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def layer_flops(shape: Shape, length: int) -> tuple[int, int]:
    """(attention, feed-forward) FLOPs of one layer forward over `length` tokens, a product and a sum counted as two.

    The rebuttal's count: attention 2 L (d q + 2 d kv + q d) + 4 L^2 d, feed-forward 6 L d f; the causal half of the
    scores is not taken off.
    """
    d, q, kv, f = shape.width, shape.query, shape.key_value, shape.feed_forward
    return 2 * length * (d * q + 2 * d * kv + q * d) + 4 * length**2 * d, 6 * length * d * f


def tipping_point(shape: Shape) -> float:
    """Tokens from which the quadratic part 4 L^2 d exceeds all the rest of a layer (the rebuttal's definition)."""
    d, q, kv, f = shape.width, shape.query, shape.key_value, shape.feed_forward
    return (2 * (d * q + 2 * d * kv + q * d) + 6 * d * f) / (4 * d)


def attention_exceeds_feed_forward(shape: Shape) -> float:
    """Tokens from which all of attention exceeds the feed-forward layer (the definition of the paper's footnote)."""
    d, q, kv, f = shape.width, shape.query, shape.key_value, shape.feed_forward
    return (6 * d * f - 2 * (d * q + 2 * d * kv + q * d)) / (4 * d)


def training_flops(record: Mapping[str, Any]) -> float | None:
    """FLOPs of a finished run as the paper counts: 6 x parameters x tokens through the model, registers included."""
    parameters = record.get("parameters", record.get("trainable_parameters"))
    return 6.0 * parameters * record["tokens"] if parameters and record.get("tokens") else None
