"""What a training method is: its settings, the parameters it adds, the layout it feeds, the losses it reads off.

The training loop, the evaluation and the workflow know this interface and no method's name:

    method = load(METHODS, "mutor")(from_mapping(Config, {"d_max": 4}, "mutor"))
    method.attach(model)                          # adds parameters under model.mtp
    method.parameter_groups(recipe)               # what the optimiser trains, and how
    method.progress = Progress(step, steps)       # before each step, whose gradients of `resting()` are thrown away
    layout, loss_targets = method.prepare_batch(examples, context)     # on the CPU, in the data loader
    total, parts = method.compute_loss(model, layout, loss_targets)    # on the device
    method.ahead(model, layout)                   # what it predicts for x_(t+k) from the tokens up to t
    method.drafter(3)                             # proposes tokens behind the next in a decoding loop: mutor/decode.py
    method.metrics(model, examples, context, 500) # what it measures beside the task's scores
    method.export(model, folder)                  # a plain checkpoint; what was added beside it, in folder/method
    method.load_own(model, folder / "method")     # puts it on the plain model again
    method.answer(model, prompts)                 # answers of the plain model

This module and the methods' files import torch inside functions only, so that plans are made without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mutor.checks import not_default
from mutor.mtp.library import Library
from mutor.mtp.settings import Context, Progress, TrainingRecipe, TrunkSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from mutor.mtp.ahead import Ahead
    from mutor.mtp.answers import Prompts
    from mutor.mtp.backbone import Backbone
    from mutor.mtp.drafts import Drafter
    from mutor.mtp.layout import Example, Layout, TokenBatch
    from mutor.mtp.loss import LossTargets


WEIGHTS, SETTINGS = "weights.safetensors", "method.json"  # files of `save_own`


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters that are trained alike.

    rate: multiple of the recipe's rate, Muon's or AdamW's; decay: whether the recipe's weight decay applies; muon:
    whether Muon may take them, all of which are matrices then.
    """

    parameters: tuple[nn.Parameter, ...]
    rate: float = 1.0
    decay: bool = True
    muon: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"rate: {self.rate} is out of range, allowed: (0, inf); freeze what is not to be trained")


class Method(Library):
    """Base of all methods: plain next-token prediction without added parameters."""

    Config: ClassVar[type]
    # what `python -m mutor methods` says of it
    source: ClassVar[str] = ""
    adds: ClassVar[str] = "nothing"  # to the model that is trained
    at_inference: ClassVar[str] = "the plain model"  # what answers
    keeps_at_inference: ClassVar[bool] = False  # whether `answer` needs what the method added; else the plain model
    trunk: Backbone
    progress = Progress()  # set by who trains, before the loss of each step
    shortest_answer: int = 1  # tokens of an answer below which only next tokens are predicted
    behind_prompt: int = 0  # tokens that it puts between each prompt and its answer, also when it answers

    def __init__(self, config: Any, *, per_sequence: bool = False):
        """config: an instance of `Config`; per_sequence: losses are means inside each sequence first."""
        self.config, self.per_sequence = config, per_sequence

    def attach(self, model: Any, initialise: Callable[[nn.Module], None] | None = None) -> Any:
        """Freeze the model, or put adapters into it, where `trunk` says so; then add the method's parameters.

        Returns `model`; a PeftModel gets them inside. Raises ValueError for a model it can't train.
        """
        from mutor.mtp import adapters

        before = [p for p in adapters.base_model(model).parameters() if p.requires_grad]
        if self.trunk_settings.trunk == "frozen":
            adapters.base_model(model).requires_grad_(False)
        elif self.trunk_settings.trunk == "lora":
            adapters.inject(model, self.trunk_settings.rank, self.trunk_settings.lora_alpha)
        self._attach(model, initialise)
        self.trunk.trained_before = before
        return model

    def _attach(self, model: Any, initialise: Callable[[nn.Module], None] | None = None) -> Any:
        from mutor.mtp.adapters import base_model
        from mutor.mtp.backbone import Backbone

        self.trunk = Backbone(base_model(model), initialise)
        self.add_parameters()
        return model

    @property
    def trunk_settings(self) -> TrunkSettings:
        """How the model itself is trained: as the settings say, as a whole where they say nothing."""
        return self.config if isinstance(self.config, TrunkSettings) else TrunkSettings()

    def add_parameters(self) -> None:
        """Build what the method adds, through `self.trunk.add`."""

    def parameter_groups(self, recipe: TrainingRecipe) -> list[ParameterGroup]:
        """All parameters that are trained, each in one group; frozen ones (`requires_grad` False) are in none.

        Raises ValueError where the recipe ends before the warm-up does.
        """
        settings, added = self.trunk_settings, self._added()
        if recipe.steps is not None and 0 < recipe.steps <= settings.warm_up_steps(recipe.steps):
            raise ValueError(f"warm_up: {settings.warm_up:g} leaves none of {recipe.steps} steps to train the trunk")
        ids = {id(p) for p in added}
        trunk = [p for p in self.trunk.model.parameters() if id(p) not in ids]
        return [*self.usual_groups(trunk, settings.trunk_rate), *self.usual_groups(added)]

    def resting(self) -> list[nn.Parameter]:
        """Parameters that the step under way must not move: who trains throws their gradients away.

        Without a gradient neither the rate nor momentum nor weight decay moves a parameter, and an optimiser's memory
        of it begins with the first one. Here the trunk during `warm_up`.
        """
        if self.progress.step >= self.trunk_settings.warm_up_steps(self.progress.steps):
            return []
        ids = {id(p) for p in self._added()}
        return [p for p in self.trunk.model.parameters() if id(p) not in ids]

    def _added(self) -> list[nn.Parameter]:
        return [] if self.trunk.added is None else list(self.trunk.added.parameters())

    def usual_groups(self, parameters: Iterable[nn.Parameter], rate: float = 1.0) -> list[ParameterGroup]:
        """The groups that parameters are in where nothing else is said, frozen ones left out.

        Muon may take the matrices inside layers. Embeddings, output layers, norms, biases and registers stay with
        AdamW, as Muon's author advises. Weight decay is for matrices, embeddings and output layers.
        """
        tables = {id(p) for p in self.trunk.tables()}
        trained = [p for p in parameters if p.requires_grad]
        return [
            ParameterGroup(tuple(p for p in trained if p.ndim == 2 and id(p) not in tables), rate, muon=True),
            ParameterGroup(tuple(p for p in trained if p.ndim == 2 and id(p) in tables), rate),
            ParameterGroup(tuple(p for p in trained if p.ndim != 2), rate, decay=False),
        ]

    def eval_layout(self, rows: TokenBatch, context: Context) -> Layout:
        """What the trained model is fed for these rows, auxiliary tokens left out: the plain rows."""
        from mutor.mtp.layout import regular

        return regular(rows, prefix_lm=context.prefix_lm)

    def train_layout(self, rows: TokenBatch, context: Context) -> Layout:
        """What the model is fed in training."""
        return self.eval_layout(rows, context)

    def check_answers(self, lengths: Iterable[int]) -> None:
        """Raise ValueError where none of the answers, so many tokens each, is long enough; reads on until one is."""
        longest = 0
        for length in lengths:
            longest = max(longest, length)
            if longest >= self.shortest_answer:
                return
        if longest:
            lower = f", or d_min of at most {longest}" if hasattr(self.config, "d_min") else ""
            raise ValueError(
                f"{type(self).__name__}: the longest answer has {longest} tokens, and below {self.shortest_answer} "
                f"nothing is predicted but next tokens; allowed: longer answers{lower}"
            )

    def read_examples(self, examples: Iterable[tuple[np.ndarray, int]]) -> None:
        """Look at the training examples, pairs (ids, prefix length), before training; here at none.

        They come in their order; where there is no end, the first thousand.
        """

    def tokens(self, example: Example) -> int:
        """How many tokens of a row a sequence takes in training, at most."""
        return len(example.ids)

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """int64 [B, L] by name of the loss: what is predicted where, -100 for nothing."""
        from mutor.mtp.layout import IGNORE

        return {"next_token": layout.target.masked_fill(layout.register, IGNORE)}

    def loss_targets(self, layout: Layout) -> dict[str, LossTargets]:
        """The targets of each loss as a list, with what each counts for: equally, or by sequence first."""
        from mutor.mtp.loss import LossTargets

        return {name: LossTargets.of(t, layout.segment, self.per_sequence) for name, t in self.targets(layout).items()}

    def prepare_batch(
        self, examples: Sequence[Example], context: Context, row_tokens: int | None = None
    ) -> tuple[Layout, dict[str, LossTargets]]:
        """What a training step is fed for a batch, or a part of one, and what it is to predict; on the CPU.

        row_tokens: sequences are packed into rows of so many tokens, at least the longest's; none: one a row.
        """
        from mutor.mtp.layout import collate

        if row_tokens is not None:
            row_tokens = max(row_tokens, *map(self.tokens, examples))
        rows = collate(examples, context.pad_id, row_tokens, self.tokens)
        self.trunk.check_tokens(rows)
        layout = self.train_layout(rows, context).compact()
        return layout, self.loss_targets(layout)

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise (a scalar) and its parts, detached scalars by name, for the log.

        loss_targets: by default those of `layout` alone. For a part of a larger batch, those whose `count` is the
        whole batch's: then the parts' losses add up to the batch's loss.
        """
        loss_targets = loss_targets or self.loss_targets(layout)
        loss = self.cross_entropy(self.trunk(model, layout).normed, loss_targets["next_token"])
        return loss, {"next_token": loss.detach()}

    def cross_entropy(self, normed: Tensor, targets: LossTargets) -> Tensor:
        """Cross entropy of the output layer on hidden states [B, L, d] that passed the final norm."""
        from mutor.mtp.loss import head_loss

        return head_loss(self.trunk.logits, normed, targets, self.trunk.vocabulary)

    def step_flops(self, layout: Layout, loss_targets: dict[str, LossTargets]) -> int:
        """FLOPs that a training step on `layout` needs, however it is computed; see mutor/mtp/flops.py.

        Here all tokens pass the model's layers and all that the method added, and each target an output layer of the
        model's size. Gradients pass frozen layers where something below them is trained: adapters, or registers, whose
        rows are computed as one. A method that computes something else counts it itself. Steps of a warm-up, or of a
        schedule that leaves out heads, count as the others.
        """
        from mutor.mtp.attention import visible_pairs
        from mutor.mtp.flops import spared_flops, step_flops

        trunk = self.trunk
        parts = [trunk.layers] if trunk.added is None else [trunk.layers, trunk.added]
        tables = {id(p) for p in trunk.tables()}
        matrices = [p for m in parts for p in m.parameters() if p.ndim == 2 and id(p) not in tables]
        heads, tokens = trunk.config.num_attention_heads, int((layout.segment >= 0).sum())
        targets, pairs = sum(len(each.index) for each in loss_targets.values()), visible_pairs(layout)
        query = heads * (getattr(trunk.config, "head_dim", None) or trunk.width // heads)
        needed = step_flops(
            matrices=sum(p.numel() for p in matrices),
            tokens=tokens,
            head=trunk.head.weight.numel(),
            targets=targets,
            query=query,
            layers=sum(trunk.is_layer(m) for part in parts for m in part.modules()),
            pairs=pairs,
        )
        below = [*trunk.layers.parameters(), *trunk.embedding.parameters()]
        trained = any(p.requires_grad for p in below)
        passed = trained or bool(layout.register.any())
        return needed - spared_flops(
            frozen=sum(p.numel() for p in matrices if not p.requires_grad),
            tokens=tokens,
            still=0 if passed else tokens,
            head=0 if trunk.head.weight.requires_grad else trunk.head.weight.numel(),
            targets=targets,
            idle=0 if trained or "next_token" not in loss_targets else len(loss_targets["next_token"].index),
            query=query,
            layers=0 if passed else len(trunk.layers),
            pairs=pairs,
        )

    def added_parameters(self, model: nn.Module) -> int:
        """Number of parameters that the method added, adapters of `trunk: lora` included."""
        from mutor.mtp.adapters import base_model
        from mutor.mtp.backbone import EXTRA

        model = base_model(model)
        if self.trunk_settings.trunk == "lora":
            return sum(p.numel() for p in model.parameters() if p.requires_grad)
        return sum(p.numel() for p in getattr(model, EXTRA).parameters()) if hasattr(model, EXTRA) else 0

    def ahead(self, model: Any, layout: Layout) -> Iterator[Ahead]:
        """What the method, with all that it added in place, predicts for x_(t+k) from the tokens up to t alone.

        layout: of `eval_layout`. Yields parts of the predictions, k = 1 first, for each t that an answer token follows
        and from which x_(t+k) is in the answer. Here k = 1 alone, which is the next token. A method that knows more
        adds it, from its own drafts where it needs the tokens between. Without gradients, in evaluation mode.
        """
        from mutor.mtp.ahead import read_off

        yield from read_off(self.trunk, layout, 1, self.trunk(model, layout).normed)

    def drafter(self, draft: int) -> Drafter:
        """What proposes so many tokens behind the next (mutor/decode.py). Raises ValueError for too many, here any."""
        raise ValueError(f"draft: {draft}, and {type(self).__name__} predicts the next token alone; allowed: 0")

    def metrics(
        self, model: Any, examples: Sequence[tuple[np.ndarray, int]], context: Context, batch_size: int
    ) -> dict[str, float]:
        """What this method measures, by name, beside the task's scores. Rates are in percent.

        Here how good its predictions ahead are, on the first examples: mutor/mtp/ahead.py: Tally. Asked on the
        validation set during training and on the test set at the end, with all that the method added in place, in
        evaluation mode, without gradients. examples: pairs (ids, prefix length); batch_size: sequences at once. Names
        must be no task's.
        """
        from mutor.mtp.ahead import EXAMPLES, Tally
        from mutor.mtp.layout import Example, collate

        tally = Tally()
        for start in range(0, min(len(examples), EXAMPLES), batch_size):
            part = [Example(ids, prefix) for ids, prefix in examples[start : min(start + batch_size, EXAMPLES)]]
            layout = self.eval_layout(collate(part, context.pad_id), context).to(model.device)
            for found in self.ahead(model, layout):
                tally.add(found, layout)
        return tally.metrics()

    def answer(self, model: Any, prompts: Prompts) -> Tensor:
        """int64 [B, length]: the answers to prompts [B, P] as this method's models give them; all tasks ask for it.

        model: the plain one, with nothing attached, unless the method `keeps_at_inference`.
        """
        from mutor.mtp.answers import decode

        return decode(model, prompts)

    def export(self, model: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Save the plain base architecture, which `AutoModelForCausalLM.from_pretrained(folder)` loads.

        What was added is saved in `folder`/method. peft's adapters are merged into the weights, in a second copy of the
        model, which itself keeps them; those of `trunk: lora` stand in `folder`/adapter, too:
        `PeftModel.from_pretrained(base, folder / "adapter")` gives the same model from the same base. state: the
        model's state dict, where its own does not hold it whole.
        """
        from mutor.mtp import adapters
        from mutor.mtp.backbone import EXTRA

        self.save_own(model, Path(folder) / "method", state)
        if self.trunk_settings.trunk == "lora":
            state = model.state_dict() if state is None else state
            adapters.save(model, state, folder / "adapter", leave_out=f"{EXTRA}.")
            state = adapters.folded(model, state)
        else:
            model = adapters.merged(model)
        whole = model.state_dict() if state is None else state
        state = {name: value for name, value in whole.items() if not name.startswith(f"{EXTRA}.")}
        model.save_pretrained(folder, state_dict=state)

    def save_own(self, model: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Save what the method added to the model, and its settings; nothing where it added nothing.

        state: as in `export`.
        """
        import json

        from safetensors.torch import save_file

        from mutor.mtp.adapters import base_model
        from mutor.mtp.backbone import EXTRA

        whole = base_model(model).state_dict() if state is None else state
        own = {k.removeprefix(f"{EXTRA}."): v.contiguous() for k, v in whole.items() if k.startswith(f"{EXTRA}.")}
        if own:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(own, folder / WEIGHTS)
            made = {"class": f"{type(self).__module__}:{type(self).__qualname__}", "settings": not_default(self.config)}
            (folder / SETTINGS).write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")

    def load_own(self, model: Any, folder: Path) -> Any:
        """Attach to the plain model what `save_own` saved beside it, and return the model.

        Raises ValueError where the method adds parameters and the folder has none, or those of other settings.
        """
        import json

        from safetensors.torch import load_file

        from mutor.mtp.adapters import base_model
        from mutor.mtp.backbone import EXTRA

        self._attach(model)  # adapters are in the plain weights already
        if hasattr(base_model(model), EXTRA):
            if not (folder / WEIGHTS).exists():
                raise ValueError(f"{folder}: has no {WEIGHTS}, the weights that {type(self).__name__} adds to a model")
            saved = json.loads((folder / SETTINGS).read_text())["settings"]
            if saved != json.loads(json.dumps(not_default(self.config))):
                raise ValueError(f"{folder}: was saved with settings {saved}, not with {not_default(self.config)}")
            getattr(base_model(model), EXTRA).load_state_dict(load_file(folder / WEIGHTS))
        return model
