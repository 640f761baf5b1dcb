"""FLOPs of a training step: arithmetic, no torch."""


def step_flops(*, matrices: int, tokens: int, head: int, targets: int, query: int, layers: int, pairs: int) -> int:
    """FLOPs of a training step: what its matrices, output layer and attention compute, three times the forward pass.

    matrices: parameters of all layers' matrices; tokens: that pass them, registers included; head: parameters of the
    output layer; targets: positions it is applied to; query: width of all query heads together; pairs: of a token and
    one that it sees, in one layer (scores and their sum, 4 x width a pair). Recomputed activations do not count.
    """
    return 6 * matrices * tokens + 6 * head * targets + 12 * query * layers * pairs


def spared_flops(
    *, frozen: int, tokens: int, still: int, head: int, targets: int, idle: int, query: int, layers: int, pairs: int
) -> int:
    """FLOPs that a step with frozen weights does not need: of what `step_flops` counts, gradients that nobody asks for.

    frozen: parameters of frozen matrices; tokens: that pass them; still: those of them that no gradient passes back;
    head: parameters of a frozen output layer; targets: all that it is applied to; idle: those whose loss trains
    nothing; pairs: of the still tokens, in one of the frozen `layers`.
    """
    return 2 * frozen * (tokens + still) + 2 * head * (targets + idle) + 8 * query * layers * pairs
