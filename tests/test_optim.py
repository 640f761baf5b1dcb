"""Schedules and optimisers against literal numbers."""

import pytest
import torch
from torch import nn

from mutor.config.recipe import Recipe
from mutor.training.optim import schedule


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"warmup": 2, "final_rate": 0.0}, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"warmup": 0.2, "hold": 0.5, "final_rate": 0.2}, [0, 0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
        ({"decay": "cosine", "warmup": 8}, [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 0.5]),
        ({"decay": "none"}, [1] * 10),
        ({"decay": "none", "warmup": 5}, [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]),
    ],
)
def test_rates_of_a_schedule(changes, rates):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0)
    scheduler = schedule(optimizer, Recipe(steps=10, batch_size=1, learning_rate=2.0, **changes))
    got = []
    for _ in range(10):
        got.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    assert got == pytest.approx(rates)
