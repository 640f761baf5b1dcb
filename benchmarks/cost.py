"""What training steps cost, as ratios inside one process: the cases of results/rebuttal_latency and cost_curves.

    python benchmarks/cost.py [--scale gpu] [--tables rebuttal_latency cost_curves] [--only TEXT ...] [--again]
    python benchmarks/cost.py --scale gpu --profile "LlamaGen-B, 128 images | mutor, 256 + 256 grouped"

Needs torch, transformers (and its accelerate), numpy and PyYAML alone, no network: weights are random. Measurements go
to runs/<scale>/cost/<table>.json, each as soon as it is there, so a killed call goes on where it was;
`python -m mutor collect rebuttal_latency cost_curves` draws them.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import torch
import torch.nn.functional as F

from mutor.checks import from_mapping
from mutor.cli import keep_memory
from mutor.config.cost_cases import cases_of, settings_of
from mutor.config.load import find_root, load_scale, load_table
from mutor.config.recipe import Recipe
from mutor.files import write_json
from mutor.models.build import build
from mutor.mtp.layout import IGNORE, Example
from mutor.mtp.method import Context
from mutor.registry import METHODS, load
from mutor.results import provenance
from mutor.results.cost import as_dict, file_of, measured, metrics_of, of_case
from mutor.training.optim import optimizer

RECIPE = Recipe(steps=1, batch_size=1, learning_rate=1e-6)


class Setup:
    """A model with random weights and one method's parameters, on which a case and its reference take turns."""

    def __init__(self, case, reference, model_config, device):
        longest = max(max(example_lengths(c)) for c in (case, reference))
        values = dict(model_config.config)
        if model_config.architecture == "llamagen":
            from mutor.models.llamagen import LlamaGenConfig

            known = LlamaGenConfig(**values)
            values["rows"] = math.ceil(longest / known.columns)
            vocabulary, self.drawn = known.codes + known.classes + 1, known.codes
        else:
            vocabulary = self.drawn = values.pop("vocab_size", 1024)
            values["max_position_embeddings"] = max(values.get("max_position_embeddings", 0), longest + 1)
        self.device = device
        self.mixed = model_config.dtype == "mixed" and device == "cuda"
        with torch.device(device):
            dtype = "float32" if device == "cpu" else model_config.dtype
            self.model = build(replace(model_config, config=values, dtype=dtype), vocabulary=vocabulary, seed=0)
        self.method = made(case)
        self.method.attach(self.model)
        self.plain = self.method
        if reference is not case:
            self.plain = made(reference)
            self.plain.attach(self.model)
        self.model.train()
        self.optimizer = optimizer(self.model, self.method, RECIPE)

    def step(self, case, batch):
        """One optimiser step of a case."""
        method = self.plain if case.method == "next_token" else self.method
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.mixed):
            if case.one_at_a_time:
                for example in batch:
                    one_sequence(method, self.model, example, len(batch))
            else:
                layout, loss_targets = self.inputs(case, method, batch)
                method.compute_loss(self.model, layout, loss_targets)[0].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), RECIPE.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def inputs(self, case, method, batch):
        """What training feeds for a batch, on the device."""
        layout, loss_targets = method.prepare_batch(batch, Context(), None if case.padded else case.row_tokens)
        if case.interleaved:
            layout = layout.take(
                (2 * layout.causal_index + layout.register).masked_fill(layout.segment < 0, 2**30).argsort(1)
            )
            loss_targets = method.loss_targets(layout)
        moved = {k: replace(g, **{n: v.to(self.device) for n, v in vars(g).items()}) for k, g in loss_targets.items()}
        return layout.to(self.device), moved

    def counts(self, case, batch):
        """(tokens that pass the trunk, FLOPs) of a step: what the method needs, however it is computed."""
        method = self.plain if case.method == "next_token" else self.method
        layout, loss_targets = self.inputs(case, method, batch)
        return int((layout.segment >= 0).sum()), method.step_flops(layout, loss_targets)


def made(case):
    kind = load(METHODS, case.method, "method")
    return kind(from_mapping(kind.Config, settings_of(case), case.key))


def example_lengths(case):
    """Tokens of each sequence, the last of which is never fed."""
    if not case.lengths:
        return [case.tokens + 1] * case.batch
    return [sum(case.lengths[i % len(case.lengths)]) for i in range(case.batch)]


def examples(case, vocabulary):
    rng = np.random.default_rng(0)
    prefixes = [case.lengths[i % len(case.lengths)][0] if case.lengths else 1 for i in range(case.batch)]
    return [
        Example(rng.integers(0, vocabulary, length), prefix, number)
        for number, (length, prefix) in enumerate(zip(example_lengths(case), prefixes, strict=True))
    ]


def one_sequence(method, model, example, of):
    """The published recipe, written anew: registers between the tokens, a dense mask built in Python loops, logits of
    every position; the loss of one sequence of `of`, backward at once."""
    ids, prefix, d = example.ids.tolist(), example.prefix, 1 + example.sample % method.config.d_max
    fed, position, target, register = [], [], [], []
    for t, token in enumerate(ids):
        fed.append(token)
        position.append(t)
        target.append(ids[t + 1] if prefix - 1 <= t < len(ids) - 1 else IGNORE)
        register.append(False)
        if prefix - 1 <= t < len(ids) - 1:
            fed.append(method.trunk.vocabulary)
            position.append(t + d - 1)
            target.append(ids[t + d] if t + d < len(ids) else IGNORE)
            register.append(True)
    mask = torch.zeros(len(fed), len(fed), dtype=torch.bool)
    for q in range(len(fed)):
        for k in range(q + 1):
            mask[q, k] = not register[k] or k == q
    device = model.device
    logits = (
        model(
            input_ids=torch.tensor([fed], device=device),
            position_ids=torch.tensor([position], device=device),
            attention_mask=mask[None, None].to(device),
            use_cache=False,
        )
        .logits[0]
        .float()
    )
    wanted, is_register = torch.tensor(target, device=device), torch.tensor(register, device=device)
    losses = [
        F.cross_entropy(logits[where], wanted[where], ignore_index=IGNORE) for where in (~is_register, is_register)
    ]
    a = method.config.a
    (((1 - a) * losses[0] + a * losses[1]) / of).backward()


def attend(setup, case):
    """Give the model the attention that a case wants."""
    names = {"auto": "sdpa" if case.one_at_a_time else "blockwise", "dense": "sdpa"}
    setup.model.set_attn_implementation(names.get(case.attention, case.attention))


def turn(setup, case, batch, steps):
    """Seconds a step, of `steps` steps."""
    attend(setup, case)
    if setup.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        setup.step(case, batch)
    if setup.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def measure(case, reference, model_config, device, scaling):
    """What cost.metrics_of reads, of one case."""
    setup = Setup(case, reference, model_config, device)
    both = [(each, examples(each, setup.drawn)) for each in (case, reference)]
    steps = []
    for each, batch in both:
        turn(setup, each, batch, 2)  # compiles, chooses kernels, makes the optimiser's state
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        one = turn(setup, each, batch, 1)
        steps.append(max(1, round(scaling.seconds / one)))
        if each is case and device == "cuda":
            memory = torch.cuda.max_memory_allocated()
    times = [
        [turn(setup, each, batch, n) for (each, batch), n in zip(both, steps, strict=True)]
        for _ in range(scaling.rounds)
    ]
    (tokens, flops), (reference_tokens, reference_flops) = (setup.counts(each, batch) for each, batch in both)
    return {
        "seconds": [t[0] for t in times],
        "reference_seconds": [t[1] for t in times],
        "sequences": case.batch,
        "tokens": tokens,
        "flops": flops,
        "reference_tokens": reference_tokens,
        "reference_flops": reference_flops,
        "peak_memory_bytes": memory if device == "cuda" else None,
        "added_parameters": setup.method.added_parameters(setup.model),
        "steps": steps,
    }


def profile(case, reference, model_config, device, folder):
    """A trace of three steps and a table of the largest kernels, into `folder`."""
    setup = Setup(case, reference, model_config, device)
    batch = examples(case, setup.drawn)
    turn(setup, case, batch, 3)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=kinds) as seen:
        seconds = turn(setup, case, batch, 3)
    name = "".join(c if c.isalnum() else "_" for c in case.key)
    folder.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(folder / f"{name}.json.gz"))
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50)
    text = f"{case.key}\n{device_name(device)}: {1e3 * seconds:.1f} ms a step under the profiler\n\n{table}\n"
    (folder / f"{name}.txt").write_text(text)
    print(text)


def device_name(device):
    from mutor.training.devices import device_name as named

    return named(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="laptop")
    parser.add_argument("--tables", nargs="+", default=["rebuttal_latency", "cost_curves"])
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--only", nargs="+", help="cases whose key holds one of these texts")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    parser.add_argument("--profile", help="profile the case of this key instead")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    keep_memory()  # as training does
    root = find_root()
    scale = load_scale(root, args.scale)
    device = "cuda" if scale.device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    # a kernel of its own for each shape: else a case and its reference may run different ones
    torch._dynamo.config.automatic_dynamic_shapes, torch._dynamo.config.recompile_limit = False, 256
    for name in args.tables:
        table = load_table(root, name)
        scaling, cases = cases_of(table, scale)
        file = file_of(Path(args.runs), args.scale, name)
        try:
            content = measured(file)
        except ValueError as error:
            print(f"{error}; all is measured again", flush=True)
            content = {"cases": {}}
        for number, case in enumerate(cases, start=1):
            model_config = (
                scale.models[scaling.models[case.model]] if case.model in scaling.models else table.models[case.model]
            )
            reference = case.reference(cases)
            if args.profile:
                if case.key == args.profile:
                    profile(case, reference, model_config, device, file.parent / "profiles")
                continue
            found = of_case(content, case)
            if found and found["device"] == device_name(device) and not args.again:
                continue
            if args.only and not any(text in case.key for text in args.only):
                continue
            began = time.monotonic()
            try:
                new = measure(case, reference, model_config, device, scaling)
                text = f"{metrics_of(new, '')['ratio'][0]:.3f} times {case.against}"
            except torch.cuda.OutOfMemoryError:
                text = "does not fit into the memory of this device"
                new = {"error": text}
            except ValueError as error:  # one case that can't be measured does not keep the others from it
                text = f"not measured: {error}"
                new = {"error": text}
            made_by = {"device": device_name(device), **provenance.provenance(root)}
            content["cases"][case.key] = {**new, "case": as_dict(case), **made_by}
            write_json(file, content)
            print(f"{name} {number}/{len(cases)} {case.key}: {text}  ({time.monotonic() - began:.0f} s)", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
