"""Random numbers by name: each stream of the project is a function of its name, a seed and some numbers alone.

    stream("epoch_order", seed, epoch).permutation(100)
    torch.Generator().manual_seed(torch_seed("image_noise", seed, batch))

No draw shifts another one, and no two streams share a generator.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import numpy as np

# All streams, with the numbers behind the seed. A new one is a new line here, which mypy asks for.
Stream = Literal[
    "offset",  # of registers: block of samples
    "offset_of_token",  # mixed offsets: sample
    "placement",  # of random registers: sample
    "masked_inputs",  # of an answer: sample
    "shuffled_targets",  # of the control: first sample of the batch
    "epoch_order",  # of training examples: epoch
    "held_out_graphs",  # data seed: 0 for validation, 1 for test
    "fixed_graphs",  # to train on; data seed
    "new_graphs",  # to train on: block of samples
    "held_out_problems",  # of generated tasks; data seed: 0 for validation, 1 for test
    "fixed_problems",  # to train on; data seed
    "new_problems",  # to train on: block of samples
    "held_out_images",  # data seed
    "image_versions",  # data seed: version
    "real_images",  # that drawn ones are compared with; data seed
    "tokenizer_batches",  # data seed
    "classifier_batches",  # data seed
    "image_classes",  # of drawn images; sample seed
    "image_noise",  # of drawn images, sample seed: batch
    "path_planning",  # 0: edges, 1: order of pairs, 2: training paths, 3 and split: right answers
    "path_answers",  # noise of drawn answers: split, batch
]


def stream(name: Stream, seed: int, *numbers: int) -> np.random.Generator:
    """A generator of its own for (name, seed, numbers), each number from 0 to 2^64 - 1.

    It is that of SeedSequence(digest of the name, spawn_key=words of the numbers). All of them have 32 bits, so that no
    two keys are the same words: SeedSequence pads short ones by zeros, and [1, 0] would be [1, 0, 0].
    """
    words = [word for number in (seed, *numbers) for word in (number & 0xFFFFFFFF, number >> 32)]
    return np.random.default_rng(np.array([*_digest(name), *words], dtype=np.uint32))  # an array is read faster


def torch_seed(name: Stream, seed: int, *numbers: int) -> int:
    """A seed of 63 bits, for torch's generators, from the stream of that name."""
    return int(stream(name, seed, *numbers).integers(2**63))


@lru_cache
def _digest(name: str) -> list[int]:
    """The four words that a name begins its streams with, as many as SeedSequence keeps apart without padding."""
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], "<u4").tolist()
