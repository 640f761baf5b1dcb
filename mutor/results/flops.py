"""FLOPs of transformer layers, and the length at which attention takes over: arithmetic, no torch.

>>> gemma = Shape(width=2048, query=2048, key_value=256, feed_forward=16384)
>>> round(sum(layer_flops(gemma, 1024)) / 1e9, 2), tipping_point(gemma)
(234.08, 26880.0)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mutor.config.schema import Shape, Table

if TYPE_CHECKING:
    from mutor.results.cells import Evidence

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


def rows(evidence: Evidence, table: Table) -> Iterator[dict[str, Any]]:
    """Cells that are computed, not run: FLOPs of a layer by model and length, and both tipping points."""
    for role, shape in table.shapes.items():
        found = []
        for length in table.lengths:
            attention, feed_forward = layer_flops(shape, length)
            values = (attention, feed_forward, attention + feed_forward)
            found += [(f"{length} tokens", m, v / 1e9, "1e9 FLOP") for m, v in zip(table.metrics, values, strict=True)]
        for rule in (tipping_point, attention_exceeds_feed_forward):
            found.append(("tipping points", rule.__name__, rule(shape), "tokens"))
        for label, metric, value, unit in found:
            variant = f"sequence_length={label.removesuffix(' tokens')}"
            yield {
                "role": role,
                "model": role,
                "ran": role,
                "benchmark": label,
                "metric": metric,
                "unit": unit,
                "mean": value,
                "reported": evidence.published(table).beside(
                    {"role": [role], "metric": [metric], "variant": [variant]}
                ),
                "label": label,
            }
