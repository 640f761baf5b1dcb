"""FLOPs of a training step: arithmetic, no torch."""


def step_flops(*, matrices: int, tokens: int, head: int, targets: int, query: int, layers: int, pairs: int) -> int:
    """FLOPs of a training step: what its matrices, output layer and attention compute, three times the forward pass.

    matrices: parameters of all layers' matrices; tokens: that pass them, registers included; head: parameters of the
    output layer; targets: positions it is applied to; query: width of all query heads together; pairs: of a token and
    one that it sees, in one layer (scores and their sum, 4 x width a pair). Recomputed activations do not count.
    """
    return 6 * matrices * tokens + 6 * head * targets + 12 * query * layers * pairs
