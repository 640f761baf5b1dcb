"""The suite's training loop against a bare PyTorch loop of the same model and batch, as a ratio in one process.

    python benchmarks/training_loop.py [--method mutor] [--scale laptop] [--steps 60] [--rounds 5]

Both do the same work: samples, layout, forward, losses, backward, clipping, optimiser, schedule. The bare loop has
none of the Trainer's services. They take turns, after a warm-up; medians of the rounds are compared.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from mutor.config.load import find_root, load_scale
from mutor.config.runs import make_spec
from mutor.models.build import build, initialiser
from mutor.mtp.method import Context
from mutor.registry import METHODS, TASKS, load
from mutor.training.data import Samples
from mutor.training.optim import optimizer, schedule
from mutor.training.trainer import MethodTrainer


def ratios(pairs):
    """Median and range of a / b over the rounds."""
    found = [a / b for a, b in pairs]
    return {
        "ratio_median": round(statistics.median(found), 3),
        "ratio_min": round(min(found), 3),
        "ratio_max": round(max(found), 3),
        "rounds": len(found),
    }


def parts(spec, steps):
    """A fresh model with its method, samples and context."""
    task = load(TASKS, spec.dataset.task, "task")(spec.task_config)
    model = build(spec.model_config, vocabulary=task.vocabulary, seed=0)
    method = load(METHODS, spec.method, "method")(spec.method_config)
    method.attach(model, initialiser(spec.model_config))
    samples = Samples(task.train(0), steps * spec.recipe.batch_size, 0)
    return model, method, samples, Context(0, task.pad_id, task.prefix_lm)


def bare(spec, steps):
    """Seconds a step of a plain loop, the first tenth of the steps left out."""
    model, method, samples, context = parts(spec, steps)
    model.train()
    recipe = spec.recipe
    own = optimizer(model, method, recipe)
    rates = schedule(own, recipe)
    loader = torch.utils.data.DataLoader(
        samples, recipe.batch_size, collate_fn=lambda e: method.prepare_batch(e, context)
    )
    for done, (layout, loss_targets) in enumerate(loader):
        if done == steps // 10:
            began = time.perf_counter()
        loss, _ = method.compute_loss(model, layout, loss_targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        own.step()
        rates.step()
        own.zero_grad()
    return (time.perf_counter() - began) / (steps - steps // 10)


def suite(spec, steps):
    """Seconds a step of the suite's Trainer, the first tenth of the steps left out."""
    model, method, samples, context = parts(spec, steps)
    times = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = MethodTrainer(
            model,
            method,
            spec.recipe,
            samples,
            context,
            Path(folder),
            score=lambda m: {"solve_rate": 0.0},
            selection_metric="solve_rate",
            log=lambda line: None,
            device="cpu",
            autocast=False,
        )
        step = trainer.training_step
        trainer.training_step = lambda *a, **k: (times.append(time.perf_counter()), step(*a, **k))[1]
        trainer.train()
    first = steps // 10
    return (times[-1] - times[first]) / (len(times) - 1 - first)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="mutor")
    parser.add_argument("--scale", default="laptop")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scale = load_scale(find_root(), args.scale)
    data = next(
        name for name, dataset in scale.datasets.items() if args.method in dataset.settings or not dataset.settings
    )
    settings = scale.datasets[data].settings.get(args.method) or {}
    spec = make_spec(scale, data, next(iter(scale.models)), args.method, settings)
    # log as often as the scale does, but neither score nor save: the bare loop does not either
    often = {"steps": args.steps, "eval_every": 10**9, "save_every": spec.recipe.log_every * 10**6}
    spec = replace(spec, recipe=replace(spec.recipe, **often))
    bare(spec, 20), suite(spec, 20)
    pairs = [(suite(spec, args.steps), bare(spec, args.steps)) for _ in range(args.rounds)]
    result = {
        "setting": spec.path,
        "suite_ms_per_step": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "bare_ms_per_step": round(1e3 * statistics.median(b for _, b in pairs), 2),
        **ratios(pairs),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
