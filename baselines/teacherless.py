"""Teacherless training: all answer tokens predicted at once from dummy inputs (Bachmann, Nagarajan, arXiv 2403.06963).

ids      Q  Q  $  $  $  $       the answer's inputs are replaced by a dummy token (the padding token,
target   .  A  B  C  D  .       which stands nowhere else)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mutor.mtp.method import Context, Method

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.answers import Prompts
    from mutor.mtp.layout import Layout, TokenBatch


@dataclass(frozen=True)
class TeacherlessConfig:
    """No settings."""

    fixed_length: ClassVar[bool] = True  # as many dummies as the longest answer has tokens


class Teacherless(Method):
    """Scored as trained: one pass over prefix and dummies gives the whole answer."""

    Config = TeacherlessConfig
    source = "Bachmann, Nagarajan, arXiv 2403.06963"
    at_inference = "the plain model, on a dummy token for each of the answer"

    def eval_layout(self, rows: TokenBatch, context: Context) -> Layout:
        """The plain rows with every answer token replaced by the dummy."""
        from dataclasses import replace

        layout = super().eval_layout(rows, context)
        return replace(layout, ids=layout.ids.masked_fill(rows.is_target, context.pad_id))

    def answer(self, model: Any, prompts: Prompts) -> Tensor:
        """int64 [B, length]: the argmax at the last prompt token and at length - 1 dummies after it."""
        from mutor.mtp.answers import decode_in_one_pass

        return decode_in_one_pass(model, prompts)
