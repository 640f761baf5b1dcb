"""Training: transformers' Trainer, subclassed once for all methods.

A run is a function of its recipe and seed alone: samples and offsets come from counters, so a killed run goes on
from its last checkpoint to the same result, bit for bit on CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from mutor.config.recipe import Recipe
from mutor.files import damage, read_json, remove_folder, seal, write_json
from mutor.mtp.layout import Example, Layout
from mutor.mtp.loss import LossTargets
from mutor.mtp.method import Context, Method
from mutor.mtp.settings import Progress
from mutor.results.provenance import other_data, taken_over
from mutor.training.data import Samples
from mutor.training.devices import agreed, is_main, processes
from mutor.training.optim import optimizer, schedule

Score = Callable[[Any], dict[str, float]]
MADE_BY = "made_by.json"


class MethodTrainer(Trainer):
    """Trains a model with a method's layout and losses, and logs every part of the loss.

    score: the model -> validation metrics, called every `recipe.eval_every` steps, none without a validation set; log:
    prints a line of progress; autocast: bfloat16 products on a GPU. Several processes share the parts of each batch
    and log what one would. sharded: each holds a part of the weights (FSDP2) instead of all (DDP). Raises ValueError
    where they can't. made_by: the code, versions and platform that train; after `resume` those of all processes that
    did, one after the other.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        recipe: Recipe,
        samples: Samples,
        context: Context,
        folder: Path,
        *,
        score: Score,
        selection_metric: str,
        log: Callable[[str], None],
        device: str,
        autocast: bool,
        sharded: bool = False,
        made_by: Mapping[str, Any] | None = None,
    ):
        self.method, self.recipe, self.context = method, recipe, context
        self.score, self.selection_metric, self.print_line = score, selection_metric, log
        self.made_by: list[Mapping[str, Any]] = [{"from": "step 0", **(made_by or {})}]
        self._parts: dict[str, Tensor] = {}
        self._tokens: Tensor | int = 0
        self._seconds = 0.0
        self._started = time.monotonic()
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert recipe.steps is not None and recipe.eval_every is not None, "Recipe.for_size comes first"
        self.steps = recipe.steps
        if recipe.accumulate % processes():
            raise ValueError(
                f"accumulate: {recipe.accumulate} parts of a batch can't be shared by {processes()} processes"
            )
        super().__init__(
            model=model,
            # sharded weights keep the dtype of their products, so that autocast has nothing to do
            args=_arguments(
                recipe, folder, context.seed, device, autocast and device == "cuda" and not sharded, sharded
            ),
            train_dataset=samples,
            data_collator=self._collate,
            callbacks=[_EvaluateEvery(recipe.eval_every)],
        )
        self.model_accepts_loss_kwargs = True  # with the count below: the parts' losses already add up to the batch's
        self.remove_callback(PrinterCallback)
        if sharded and not self.is_fsdp_enabled:
            raise ValueError(
                f"sharded: not with {processes()} processes on {self.args.device.type}; allowed: several GPUs"
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimiser and schedule; of sharded parameters, where they are."""
        own: Any = self.model
        if self.is_fsdp_enabled:
            _shard(own, self.method.trunk.layers[-1], self.args.device.type)
        self.optimizer = optimizer(own, self.method, self.recipe)
        self.lr_scheduler = schedule(self.optimizer, self.recipe)
        return self.optimizer

    def _collate(self, examples: list[Example]) -> dict[str, Any]:
        """What the model is fed for a part of a batch, and what it is to predict."""
        layout, loss_targets = self.method.prepare_batch(examples, self.context, self.recipe.row_tokens)
        self.method.trunk.check_lengths(layout)
        return {
            "layout": _flat(layout),
            "loss_targets": {name: _flat(targets) for name, targets in loss_targets.items()},
        }

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """This process's parts of the next batch; each loss is divided by what the whole batch has of its targets."""
        parts = list(itertools.islice(epoch_iterator, num_batches))
        if not parts:
            return parts, None
        counts = torch.stack(
            [torch.stack([targets["count"] for targets in part["loss_targets"].values()]) for part in parts]
        )
        totals = self.accelerator.reduce(counts.sum(0).to(self.args.device), "sum")
        for part in parts:
            for targets, total in zip(part["loss_targets"].values(), totals, strict=True):
                targets["count"] = total
        return parts, totals[0]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss; its parts and the tokens that passed the trunk are summed up for the log.

        Gradients are averaged over processes, each of which has a share of the sum.
        """
        self.method.progress = Progress(self.state.global_step, self.steps)
        layout = Layout(**inputs["layout"])
        loss_targets = {name: LossTargets(**targets) for name, targets in inputs["loss_targets"].items()}
        loss, parts = self.method.compute_loss(model, layout, loss_targets)
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value
        self._tokens = self._tokens + (layout.segment >= 0).sum()
        loss = loss * processes()
        return (loss, {}) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted here."""
        return 0

    def seconds(self) -> float:
        """Training time so far, over all the processes that worked on this run."""
        return self._seconds + time.monotonic() - self._started

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, tokens and seconds; a loss that is not finite ends the run."""
        if "loss" in logs:
            sums = torch.stack([v.double() for v in (*self._parts.values(), torch.as_tensor(self._tokens))])
            *values, tokens = self.accelerator.reduce(sums, "sum").tolist()
            logs |= {name: value / self.recipe.log_every for name, value in zip(self._parts, values, strict=True)}
            logs["tokens"] = self._last("tokens", 0) + int(tokens)
            self._parts, self._tokens = {}, 0
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(f"the loss is {logs['loss']} at step {self.state.global_step}; stopped")
            self.print_line(self._line(logs))
        logs["seconds"] = round(self.seconds(), 3)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the model on the validation set, if there is one; end the run when `stop_at` is reached."""
        with _gathered(self.model):
            scores = self.score(self.accelerator.unwrap_model(self.model))
        if not scores:
            return {}
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.log(dict(metrics))
        reached = scores[self.selection_metric]
        self.print_line(f"step {self.state.global_step}/{self.steps}  {self.selection_metric} {reached:.1f}")
        if self.recipe.stop_at is not None and reached >= self.recipe.stop_at:
            self.control.should_training_stop = True
            self.control.should_save = False  # a run killed after this point repeats its last steps and stops again
        return metrics

    def gathered_state(self) -> dict[str, Tensor]:
        """The model's state dict, for the main process; all processes have to ask for it."""
        model: Any = self.model
        state = self.accelerator.get_state_dict(model)
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in state:  # tied weights are gathered one by one: one again, else both would be saved
                state[name] = state[first.setdefault(id(parameter), name)]
        return state

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what marks a checkpoint as complete comes next

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if is_main():
            checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_json(checkpoint / MADE_BY, self.made_by)
            seal(checkpoint)

    def resume(self) -> bool:
        """Train to the end, from the last checkpoint that is whole if there is one; others are deleted, by name.

        Returns whether there was one.
        """
        folder = Path(str(self.args.output_dir))
        data_hash = self.made_by[-1].get("data_hash")
        checkpoint = agreed(last_checkpoint(folder, data_hash, self.print_line) if is_main() else None)
        if checkpoint:
            history = read_json(checkpoint / "trainer_state.json")["log_history"]
            self._seconds = max((entry.get("seconds", 0.0) for entry in history), default=0.0)
            step = f"step {checkpoint.name.rpartition('-')[2]}"
            self.made_by = taken_over(read_json(checkpoint / MADE_BY), self.made_by[-1], step)
            self.print_line(f"resumed from {step}")
        if processes() > 1:
            set_seed(self.args.seed + self.args.process_index)  # dropout differs between the parts of a batch
        self._started = time.monotonic()
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return checkpoint is not None

    def _last(self, key: str, default: Any) -> Any:
        return next((entry[key] for entry in reversed(self.state.log_history) if key in entry), default)

    def _line(self, logs: dict[str, float]) -> str:
        step, total = self.state.global_step, self.steps
        left = self.seconds() / max(step, 1) * (total - step)
        parts = "  ".join(f"{k} {v:.3f}" for k, v in logs.items() if k == "loss" or k in self._names(logs))
        return f"step {step}/{total}  {parts}  {int(left // 60)}:{int(left % 60):02d} left"

    @staticmethod
    def _names(logs: dict[str, float]) -> list[str]:
        known = ("loss", "grad_norm", "learning_rate", "tokens", "seconds", "epoch")
        return [name for name in logs if name not in known]


def _arguments(recipe: Recipe, folder: Path, seed: int, device: str, bf16: bool, sharded: bool) -> TrainingArguments:
    """The recipe in the Trainer's words."""
    assert recipe.steps is not None
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // recipe.accumulate,
        gradient_accumulation_steps=recipe.accumulate // processes(),
        max_grad_norm=recipe.clip,
        bf16=bf16,
        use_cpu=device == "cpu",
        seed=seed,
        train_sampling_strategy="sequential",
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_total_limit=2,  # one is used where the newest is damaged
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=True,
        report_to=[],
        ddp_find_unused_parameters=False,  # all are used, some outside of the model's own forward
        fsdp=sharded or None,  # type: ignore[arg-type]  # a string in the past
        fsdp_config={"version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "SHARDED_STATE_DICT"},
        # gradients of each part are spread at once: gathered ones would take as much as gathered weights
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": sharded}},
    )


class _EvaluateEvery(TrainerCallback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = False  # the last step has just done both


def _shard(model: Any, layer: nn.Module, device: str) -> None:
    """Spread the parameters over the processes: each layer's are gathered for its own calls, all others for a step.

    Norm, embedding, output layer and what a method adds are called outside of the model's forward, and more than once,
    so they belong to the model as a whole; the Trainer would put some into groups that expect one call each.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (processes(),)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),  # of bfloat16 gradients, too
    }
    for module in [m for m in model.modules() if type(m) is type(layer)]:  # those that a method adds are alike
        fully_shard(module, **options)
    fully_shard(model, reshard_after_forward=False, **options)


@contextlib.contextmanager
def _gathered(model: Any) -> Iterator[None]:
    """Inside, a sharded model is gathered once instead of for every token that it writes."""
    if not hasattr(model, "set_reshard_after_forward"):
        yield
        return
    model.set_reshard_after_forward(False)
    yield
    for module in (m for m in model.modules() if hasattr(m, "set_reshard_after_forward")):
        module.reshard()
        module.set_reshard_after_forward(module is not model, recurse=False)


def _flat(record: Layout | LossTargets) -> dict[str, Tensor]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def last_checkpoint(folder: Path, data_hash: str | None, log: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in a folder that is whole, and of these data; newer ones are removed.

    log: told what is wrong with each of them.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        wrong = damage(checkpoint) or other_data("it", read_json(checkpoint / MADE_BY), data_hash)
        if wrong is None:
            return checkpoint
        log(f"{checkpoint.name} is not used: {wrong}")
        remove_folder(checkpoint)
    return None
