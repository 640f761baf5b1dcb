"""How a model is trained: the same for every method of a comparison, fixed in the scale."""

from dataclasses import dataclass, replace

from mutor.checks import setting


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Optimiser, schedule, batch; intervals of logging, evaluation and checkpoints."""

    steps: int | None = setting(None, doc="optimiser steps; 0: the model is scored as it starts", low=0)
    epochs: float | None = setting(None, doc="or passes through the training data, each of whole batches", low=0)
    batch_size: int = setting(doc="sequences an optimiser step", low=1)
    accumulate: int = setting(1, doc="parts a batch is computed in, with the same result", low=1)
    row_tokens: int | None = setting(
        None, doc="sequences are packed into rows of so many tokens (at least the longest); none: one a row", low=1
    )
    optimizer: str = setting("adamw", doc="muon: Muon for matrices, AdamW for the rest", choices=("adamw", "muon"))
    learning_rate: float = setting(doc="peak rate of AdamW", low=0, open_ends=True)
    muon_rate: float = setting(0.02, doc="peak rate of Muon", low=0, open_ends=True)
    betas: tuple = setting((0.9, 0.999), doc="AdamW's betas", low=0, high=1)
    weight_decay: float = setting(0.0, doc="weight decay, not applied to norms and biases", low=0)
    clip: float = setting(1.0, doc="gradient norm clipped to this", low=0, open_ends=True)
    warmup: float = setting(0.0, doc="steps of linear warm-up; below 1: this share of all steps", low=0)
    hold: float = setting(0.0, doc="share of the steps after warm-up at the peak rate, before the decay", low=0, high=1)
    decay: str = setting("linear", doc="form of the decay", choices=("linear", "cosine", "none"))
    final_rate: float = setting(0.0, doc="share of the peak rate at the end of the decay", low=0, high=1)
    loss_mean: str = setting(
        "token", doc="mean over all tokens, or inside each sequence first", choices=("token", "sequence")
    )
    gradient_checkpointing: bool = setting(False, doc="recompute activations instead of keeping them")
    log_every: int = setting(50, doc="steps between log lines", low=1)
    eval_every: int | None = setting(500, doc="steps between scores on the validation set; none: an epoch", low=1)
    save_every: int = setting(500, doc="steps between checkpoints, a multiple of log_every", low=1)
    keep_steps: tuple = setting(
        (), was="keep", doc="steps whose models are kept and scored at the end, as well as best and last", low=1
    )
    eval_batch_size: int = setting(500, doc="sequences scored at once", low=1)
    decode_prompts: int = setting(
        0,
        doc="so many test prompts are continued at the end, one at a time, with drafts of the method's own, or looked "
        "up in the text where it has none; they are the first that leave room for it; 0: none",
        low=0,
    )
    decode_tokens: int = setting(64, doc="new tokens behind each of them, fewer where the text ends", low=8)
    stop_at: float | None = setting(None, doc="end a run when the validation score reaches this, in percent")

    def for_size(self, size: int | None) -> "Recipe":
        """The recipe in steps, for training data of `size` examples (none: without end)."""
        if not self.trains:
            return replace(self, steps=0, epochs=None)
        if size is None:
            if self.steps is None or self.eval_every is None:
                raise ValueError("epochs: these training data have no end; give steps and eval_every")
            return self
        epoch = size // self.batch_size
        if epoch == 0:
            raise ValueError(f"batch_size: {self.batch_size} is more than the {size} training examples")
        steps = self.steps if self.epochs is None else round(self.epochs * epoch)
        if steps == 0:
            raise ValueError(f"epochs: {self.epochs} of {epoch} steps are none; allowed: 0, or enough for one")
        return replace(self, steps=steps, epochs=None, eval_every=self.eval_every or epoch)

    @property
    def trains(self) -> bool:
        """Whether there is a step: with none, a model is scored as it is."""
        return 0 not in (self.steps, self.epochs)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps: give either steps or epochs, not {self.steps} and {self.epochs}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} does not divide batch_size {self.batch_size}")
        if self.save_every % self.log_every:
            raise ValueError(f"save_every: {self.save_every} is not a multiple of log_every {self.log_every}")
        for step in self.keep_steps:
            if step % (self.eval_every or step):
                raise ValueError(f"keep_steps: step {step} is not a multiple of eval_every {self.eval_every}")
        if len(self.betas) != 2:
            raise ValueError(f"betas: {self.betas} are not two numbers")
