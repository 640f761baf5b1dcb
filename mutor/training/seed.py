"""One seed of a setting: train, save, load what was saved, score it, write the record.

SeedRun(spec, 42, task, "cpu", env, print).finish()
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutor.config.recipe import Recipe
from mutor.config.runs import Spec
from mutor.files import complete_folder, damage, read_json, remove_folder, sweep, write_json
from mutor.mtp.method import Context, Method
from mutor.registry import AUTO, METHODS, answers_under, load
from mutor.results import provenance, records
from mutor.results.record_schema import pack
from mutor.tasks.task import Log, Source, Task, in_order
from mutor.training.devices import agreed, device_name, is_main, processes

if TYPE_CHECKING:
    from mutor.training.trainer import MethodTrainer


@dataclass(frozen=True)
class RunEnvironment:
    """Where and how runs take place: folders, device, threads a process, what their lines of progress begin with."""

    root: Path
    runs: Path
    device: str = "cpu"
    threads: int = 1
    label: str = ""
    rerun_stale: bool = False


class SeedRun:
    """One seed of a setting in its folder; each stage is finished, or counts as not begun.

    Where a launcher started several processes, all train and score while they train; one saves, and scores at the end.
    """

    def __init__(self, spec: Spec, seed: int, task: Task, device: str, env: RunEnvironment, log: Log):
        """device: "cpu" or "cuda"; log: prints a line of progress."""
        self.task = task = task.for_seed(seed)
        self.spec, self.seed, self.device, self.env, self.print_line = spec, seed, device, env, log
        self.folder = records.seed_folder(env.runs, spec, seed)
        self.context = Context(seed=seed, pad_id=task.pad_id, prefix_lm=task.prefix_lm)
        method_class: type[Method] = load(METHODS, spec.method, "method")
        self.method = method_class(spec.method_config, per_sequence=spec.recipe.loss_mean == "sequence")
        # read before training, in which a file may be edited, by the one process that writes it down
        made_by = {"data_hash": task.data_hash(), **provenance.made_by(env.root, spec.as_dict())} if is_main() else {}
        self.made_by: dict[str, Any] = made_by
        self.trainer: MethodTrainer | None = None
        self._best = float("-inf")

    def finish(self) -> None:
        """Train, unless last/ is there and whole; score; write metrics.json."""
        if is_main():
            sweep(self.folder)
        if agreed(not self._trained_before()):
            self.train()
        if not is_main():
            return  # and wait at the next seed, if there is one
        remove_folder(self.folder / "checkpoints")  # a killed process may have left them beside last/
        training = self._training()
        checkpoints = self.score(training)
        told = {k: v for k, v in checkpoints[-1]["metrics"].items() if k != "loss" and "_draft_" not in k}
        self.print_line("  ".join(f"{k} {v:.1f}" for k, v in told.items()))
        makers = provenance.taken_over(training["made_by"], self.made_by, "scoring")
        record = records.compose(self.spec, self.seed, training, checkpoints, makers, self._circumstances())
        write_json(self.folder / "metrics.json", record)

    def _training(self) -> dict[str, Any]:
        """What training has left beside its last model."""
        found: dict[str, Any] = read_json(self.folder / "last/training.json")
        return found

    def _trained_before(self) -> bool:
        """Whether training has ended, on these data, and its models are as they were saved.

        What is wrong is named, and all models are deleted.
        """
        models = [part for part in records.models(self.folder) if part.name != "checkpoints"]
        if not is_main() or self.folder / "last" not in models:
            return False
        damages = ((part, damage(part)) for part in models)
        wrong = next((f"{part.name}/ is damaged: {what}" for part, what in damages if what), None)
        if wrong is None:
            wrong = provenance.other_data("last/", self._training()["made_by"], self.made_by["data_hash"])
        if wrong is None:
            return True
        self.print_line(f"{wrong}; the run starts again")
        for model in models:
            remove_folder(model)
        return False

    def train(self) -> None:
        """Train to the end and save last/, and on the way best/ and what the recipe keeps.

        A recipe of no steps saves the model as it starts: its base's, the pretrained one or a new one.
        """
        from mutor.models.build import build, initialiser

        spec, started, source = self.spec, _now(), self.task.train(self.seed)
        recipe = spec.recipe.for_size(source.size)
        if source.dropped:
            self.print_line(f"{source.size} training examples; {source.dropped} longer ones dropped")
        if recipe.steps:
            self.method.check_answers(len(ids) - prefix for ids, prefix in in_order(source))
        base = None
        if spec.base:
            base = records.seed_folder(self.env.runs, spec.base, spec.base_seed_of(self.seed)) / "last"
        model = build(spec.model_config, vocabulary=self.task.vocabulary, seed=self.seed, base=base)
        self.task.prepare(model, self.print_line, self.method.behind_prompt)
        self.method.attach(model, initialiser(spec.model_config))
        if spec.model_config.attention != AUTO:
            model.set_attn_implementation(spec.model_config.attention)
        resumed = False
        if recipe.steps:
            self.method.read_examples(in_order(source))
            self.trainer = self._new_trainer(model, recipe, source)
            resumed = self.trainer.resume()
        training = {"started": started, "resumed": resumed, **self._trained(model, source)}
        training["made_by"] = self.trainer.made_by if self.trainer else [{"from": "step 0", **self.made_by}]
        training["base_weights_hash"] = records.weights_hash(base) if base else None
        self._save("last", model, lambda target: {**training, "weights_hash": records.weights_hash(target)})

    def _new_trainer(self, model: Any, recipe: Recipe, source: Source) -> MethodTrainer:
        from mutor.training.data import Samples
        from mutor.training.trainer import MethodTrainer

        assert recipe.steps is not None
        return MethodTrainer(
            model,
            self.method,
            recipe,
            Samples(source, recipe.steps * recipe.batch_size, self.seed),
            self.context,
            self.folder / "checkpoints",
            score=self._validate,
            selection_metric=self.task.selection_metric,
            log=self.print_line,
            device=self.device,
            autocast=self.spec.model_config.dtype != "float32",
            sharded=self.spec.sharded and processes() > 1,
            made_by=self.made_by,
        )

    def _validate(self, model: Any) -> dict[str, float]:
        """Score the model that is trained on the validation set; save it if it is the best, or one that is kept.

        Without a validation set there are no metrics, and none is the best.
        """
        from mutor.mtp.trials import evaluating

        assert self.trainer is not None
        recipe, name, step = self.trainer.recipe, self.task.selection_metric, self.trainer.state.global_step
        metrics: dict[str, float] = {}
        if self.task.chosen_on(self.spec.task_config):
            with evaluating(model):
                metrics, _ = self.task.evaluate(model, self.method, self.context, "valid", recipe.eval_batch_size)
                metrics |= self._own_metrics(model, "valid", metrics)
            metrics = agreed(metrics)  # rounding may differ between devices; what follows from them may not
            before = (entry[f"eval_{name}"] for entry in self.trainer.state.log_history if f"eval_{name}" in entry)
            if metrics[name] > max(self._best, *before, float("-inf")):
                self._best = metrics[name]
                self._save("best", model, lambda target: {"step": step, name: metrics[name]})
        if step in recipe.keep_steps:
            self._save(f"step{step}", model)
        return metrics

    def _own_metrics(self, model: Any, split: str, measured: dict[str, float]) -> dict[str, float]:
        """What the method itself measures. Raises ValueError for a name that the task has measured already."""
        import torch

        with torch.no_grad():
            own = self.method.metrics(model, self.task.examples(split), self.context, self.spec.recipe.eval_batch_size)
        taken = sorted(own.keys() & measured.keys())
        if taken:
            raise ValueError(f"{self.spec.method}: metrics: {taken[0]!r} is a metric of the task; choose another name")
        return own

    def _save(self, name: str, model: Any, training: Callable[[Path], dict[str, Any]] | None = None) -> None:
        """Save the plain model as a folder, with the method's own weights and the tokenizer; all processes call it.

        training: from the folder to the content of its training.json.
        """
        state = self.trainer.gathered_state() if self.trainer else None  # from all processes
        if not is_main():
            return
        with complete_folder(self.folder / name) as target:
            self.method.export(model, target, state)
            if self.task.tokenizer is not None:
                self.task.tokenizer.save_pretrained(target)
            if training is not None:
                write_json(target / "training.json", training(target))

    def _trained(self, model: Any, source: Source) -> dict[str, Any]:
        """What training leaves behind besides the model."""
        history = self.trainer.state.log_history if self.trainer else []
        curve = [e for e in history if "loss" in e or f"eval_{self.task.selection_metric}" in e]
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return {
            "curve": curve,
            "steps": self.trainer.state.global_step if self.trainer else 0,
            "seconds": round(self.trainer.seconds(), 3) if self.trainer else 0.0,
            "tokens": next((e["tokens"] for e in reversed(curve) if "tokens" in e), 0),
            "added_parameters": self.method.added_parameters(model),
            "parameters": sum(size for size, _ in sizes),
            "trainable_parameters": sum(size for size, trained in sizes if trained),
            "examples": source.size,
            "examples_dropped": source.dropped,
        }

    def score(self, training: dict[str, Any]) -> list[dict[str, Any]]:
        """Test metrics and scores of the best, the kept and the last checkpoint, as anyone would load them."""
        best = self.folder / "best/training.json"
        steps = {"best": read_json(best)["step"]} if best.exists() else {}
        same = steps.get("best", training["steps"]) == training["steps"]
        if same:
            steps = {}
        kept = (f"step{step}" for step in self.spec.recipe.keep_steps)
        steps |= {name: int(name.removeprefix("step")) for name in kept if (self.folder / name).exists()}
        found = []
        for name, step in (steps | {"last": training["steps"]}).items():
            began = time.monotonic()
            metrics, scores = self._tested(name)
            found.append(
                {
                    "names": ["best", "last"] if name == "last" and same else [name],
                    "step": step,
                    "metrics": metrics,
                    "scores": {metric: pack(values) for metric, values in scores.items()},
                    "seconds_evaluating": round(time.monotonic() - began, 3),
                }
            )
        return found

    def _tested(self, name: str) -> tuple[dict[str, float], dict[str, Any]]:
        """Test metrics and scores of a saved model: of the plain one, unless the method keeps what it added."""
        from transformers import AutoModelForCausalLM

        from mutor.models.build import implementation, torch_dtype

        spec, method = self.spec, self.method
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder / name,
            dtype=torch_dtype(spec.model_config),
            attn_implementation=implementation(answers_under(spec.model_config.attention)),
        )
        model.to(self.device)
        model.eval()
        if method.keeps_at_inference:
            method.load_own(model, self.folder / name / "method").eval()
        file = self.folder / f"predictions-{name}.jsonl"
        metrics, scores = self.task.evaluate(
            model, method, self.context, "test", spec.recipe.eval_batch_size, file, self.print_line
        )
        if not method.keeps_at_inference:
            method.load_own(model, self.folder / name / "method").eval()
        metrics |= self._own_metrics(model, "test", metrics)
        return metrics | (self._decoded(model) if name == "last" else {}), scores

    def _decoded(self, model: Any) -> dict[str, float]:
        """What drafts are worth in decoding, where the recipe asks for it and answers are the likeliest tokens."""
        from mutor.training.decoding import fitting, measure

        wanted, new_tokens = self.spec.recipe.decode_prompts, self.spec.recipe.decode_tokens
        if not wanted or not self.task.greedy:
            return {}
        prompts = [ids[:prefix] for ids, prefix in self.task.examples("test")]
        found = fitting(model, prompts, new_tokens)[:wanted]
        if len(found) < min(wanted, len(prompts)):
            self.print_line(f"{len(found)} of {len(prompts)} test prompts leave room for {new_tokens} new tokens")
        end_id = None if self.task.tokenizer is None else self.task.tokenizer.eos_token_id
        return measure(
            model,
            self.method,
            found,
            new_tokens=new_tokens,
            end_id=end_id,
            prefix_lm=self.task.prefix_lm,
            log=self.print_line,
        )

    def _circumstances(self) -> dict[str, Any]:
        """What the run was made on, and of which data."""
        import torch

        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else peak,
            "device": device_name(self.device),
            "threads": self.env.threads,
            "processes": processes(),
            "finished": _now(),
            "train_data_name": self.task.describe(self.spec.task_config),
            "test_data_hash": self.task.test_data_hash(),
            "chosen_on": self.task.chosen_on(self.spec.task_config),
        }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
