"""What layouts and masks have to know of a model: little enough that the workers of a data loader can hold it."""

from __future__ import annotations

from typing import Any

import torch

from mutor.mtp.attention import attention_mask, sliding_window
from mutor.mtp.layout import Layout, TokenBatch


class ModelFacts:
    """name: of the model's class; config: transformers' configuration of it, for texts; vocabulary: rows of its
    embedding; dtype: of its weights; exact_windows: whether its sliding windows can be told by explicit masks.
    """

    name: str
    config: Any
    vocabulary: int
    dtype: torch.dtype
    exact_windows: bool

    def facts(self) -> ModelFacts:
        """These alone, without the model."""
        alone = ModelFacts()
        alone.name, alone.config, alone.vocabulary = self.name, self.config, self.vocabulary
        alone.dtype, alone.exact_windows = self.dtype, self.exact_windows
        return alone

    def mask(self, layout: Layout) -> Any:
        """Who sees whom, in the form that the model takes."""
        return attention_mask(layout, self.config, self.dtype, windows=self.exact_windows)

    def check_tokens(self, rows: TokenBatch) -> None:
        """Raise ValueError for an id beyond the vocabulary, which would be read as a register without a word."""
        wrong = ((rows.ids < 0) | (rows.ids >= self.vocabulary)) & (rows.segment >= 0)
        if wrong.any():
            raise ValueError(
                f"{self.name}: {int(rows.ids[wrong][0])} is no token of this model, which has {self.vocabulary}; take "
                "its own tokenizer, or call resize_token_embeddings(len(tokenizer)) before attach"
            )

    def check_lengths(self, layout: Layout) -> None:
        """Raise ValueError for a sequence beyond the model's positions, or beyond a window that no mask can tell.

        Looks at the layout's values, so that it belongs on the CPU.
        """
        config, row = self.config, layout.ids.shape[1]
        limits = {
            "max_position_embeddings": getattr(config, "max_position_embeddings", None),
            "sliding_window": None if self.exact_windows else sliding_window(config),
            "attention_chunk_size": getattr(config, "attention_chunk_size", None),
        }
        for key, room in limits.items():
            if room and row > room and (tokens := int(layout.position.max()) + 1) > room:
                raise ValueError(
                    f"{self.name}: a sequence of {tokens} tokens is longer than the model's {key} of {room}; shorten "
                    f"the sequences to {room} tokens"
                )
