"""Streams of random numbers: each a function of its name, seed and numbers, no two alike."""

import ast
import hashlib
import itertools
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from mutor.mtp import registers
from mutor.streams import Stream, stream, torch_seed
from mutor.tasks.star_graph import StarGraph, StarGraphConfig
from mutor.tasks.task import Source
from mutor.training.data import Samples

ROOT = Path(__file__).parent.parent


def test_no_two_streams_are_alike():
    """All names, small seeds, and numbers from none to three, zeros among them."""
    numbers = [n for count in range(4) for n in itertools.product(range(3), repeat=count)]
    keys = [(name, seed, *n) for name in get_args(Stream) for seed in range(3) for n in numbers]
    keys += [("offset", 2**32), ("offset", 0, 2**32), ("offset", 1, 2**33)]  # numbers of more than 32 bits
    first = {int(stream(*key).integers(2**63)) for key in keys}
    assert len(first) == len(set(keys)) > 1500
    assert {torch_seed(*key) for key in keys} == first


def test_a_stream_is_that_of_a_spawn_key_of_fixed_length():
    for name, seed, number in (("offset", 0, 0), ("epoch_order", 42, 7), ("placement", 1, 5 + 3 * 2**32)):
        entropy = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
        key = (seed, 0, number % 2**32, number // 2**32)
        wanted = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=key))
        assert (stream(name, seed, number).random(5) == wanted.random(5)).all()
    with pytest.raises(OverflowError):
        stream("offset", -1)


def test_draws_of_seed_0_share_no_generator(monkeypatch):
    """Every generator that epochs, registers and graphs make, as they are called in a run: each begins elsewhere."""
    made, plain = [], np.random.default_rng

    def recorded(*arguments):
        made.append(str(plain(*arguments).bit_generator.state))
        return plain(*arguments)

    registers._block.cache_clear()
    monkeypatch.setattr(np.random, "default_rng", recorded)
    samples, where = torch.tensor([[0, 1, 4096, 8192]]), torch.zeros(1, 4).bool()
    for seed in (0, 1):
        source = Source(lambda index: [(np.arange(3), 1)] * len(index), 2)
        for epoch in range(4):
            Samples(source, 8, seed).__getitems__([2 * epoch])
        registers.offsets(samples, seed=seed, d_min=1, d_max=4)
        registers.offsets(samples, seed=seed, d_min=1, d_max=4, mixed=True)
        registers.placed(~where, where.long(), samples, placement="random", registers=1, seed=seed)
        StarGraph(StarGraphConfig(2, 3, 9, train_size=9, valid_size=5, test_size=5, data_seed=seed)).train(0)
        new = StarGraph(StarGraphConfig(2, 3, 9, valid_size=5, test_size=5, data_seed=seed + 2)).train(seed)
        new.examples(np.array([0, 4096, 8192]))
    assert len(made) == len(set(made)) == 2 * (4 + 3 + 4 + 4 + 3 + 2 + 3)


def test_all_generators_come_from_streams():
    """But those whose seed is written out, which belong to a published order."""
    found = {}
    for file in [*ROOT.glob("mutor/**/*.py"), *ROOT.glob("baselines/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("default_rng", "SeedSequence")):
                written = all(isinstance(argument, ast.Constant) for argument in node.args)
                found.setdefault(written, set()).add(file.name)
    assert found == {False: {"streams.py"}, True: {"corpora.py"}}
