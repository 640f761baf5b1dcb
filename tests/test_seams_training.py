"""What a user may add in one class and one line: each method here is written as one would be in a file of its own.

StepBack     a method that is not trained: it starts from another run's model and answers in its own way
Pause        a method that keeps a token at inference: a learned row behind the prompt
Foresight    a method that measures something by itself: how often its first head knows x_(t+2)
Repeat       a task: say the prompt again
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mutor.baselines.next_token import NextToken, NextTokenConfig
from mutor.baselines.parallel_mtp import ParallelMTP
from transformers import AutoModelForCausalLM

from mutor.checks import from_mapping, setting
from mutor.config.load import load_scale
from mutor.config.recipe import Recipe
from mutor.config.runs import make_spec
from mutor.mtp.answers import Prompts, decode
from mutor.mtp.layout import IGNORE, Example, collate, targets_ahead
from mutor.mtp.method import Context, Method
from mutor.registry import METHODS, TASKS, register
from mutor.results import records
from mutor.tasks.star_graph import StarGraph
from mutor.tasks.task import Source, Task
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class StepBackConfig:
    """Its one setting."""

    rank: int = setting(2, doc="which of the likeliest tokens is taken first: 1 is greedy", low=1)


class StepBack(Method):
    """Takes the second likeliest token at first, then answers greedily; the model is another run's."""

    Config = StepBackConfig
    config: StepBackConfig

    def answer(self, model, prompts):
        def choose(logits, step):
            return logits.topk(self.config.rank).indices[:, -1] if step == 0 else prompts.choose(logits, step)

        return decode(model, replace(prompts, choose=choose))


class Pause(Method):
    """A learned token behind the prompt, from which the answer is predicted; it stays at inference."""

    Config = NextTokenConfig
    keeps_at_inference = True

    def add_parameters(self):
        self.row = self.trunk.extra_rows(1)
        self.trunk.add(torch.nn.ModuleDict({"pause": self.row}))

    def eval_layout(self, rows, context):
        """Each row with the token behind its prompt."""
        paused = []
        for ids, segment, is_target, sample in zip(rows.ids, rows.segment, rows.is_target, rows.sample, strict=True):
            ids, prefix = ids[segment >= 0].tolist(), int(((segment >= 0) & ~is_target).sum())
            ids.insert(prefix, self.trunk.vocabulary)
            paused.append(Example(np.array(ids), prefix + 1, int(sample[0])))
        return super().eval_layout(collate(paused, context.pad_id), context)

    def answer(self, model, prompts):
        pause = torch.full_like(prompts.ids[:, :1], self.trunk.vocabulary)
        ids = torch.cat([prompts.ids, pause], dim=1)
        attended = torch.cat([prompts.attended, torch.ones_like(pause)], dim=1)
        return decode(model, replace(prompts, ids=ids, attended=attended))


class Foresight(ParallelMTP):
    """Parallel heads that say only how often the first is right about the token after the next."""

    def metrics(self, model, examples, context, batch_size):
        right = total = 0
        for start in range(0, len(examples), batch_size):
            part = [Example(ids, prefix) for ids, prefix in examples[start : start + batch_size]]
            layout = self.eval_layout(collate(part, context.pad_id), context).to(model.device)
            target = targets_ahead(layout, 2)
            out = self.trunk(model, layout)
            guess = self.trunk.logits(self.trunk.norm(out.apply_layer(self.heads[0], out.hidden))).argmax(-1)
            right += int((guess == target).sum())
            total += int((target != IGNORE).sum())
        return {"accuracy_two_ahead": 100 * right / total}


@dataclass(frozen=True)
class RepeatConfig:
    """Its one setting."""

    length: int = setting(3, doc="digits to repeat", low=1, high=5)


class Repeat(Task):
    """Some digits, an equals sign, the digits again."""

    Config = RepeatConfig
    selection_metric = "digit_accuracy"
    vocabulary = 12
    pad_id = 11

    @staticmethod
    def describe(config):
        return f"repeat {config.length} digits"

    def _made(self, seed, count):
        digits = np.random.default_rng(seed).integers(10, size=(count, self.config.length))
        return [(np.array([*row, 10, *row]), self.config.length + 1) for row in digits]

    def train(self, seed):
        found = self._made([seed, 1], 400)
        return Source(lambda index: [found[i] for i in index], len(found))

    def examples(self, split):
        return self._made([0, 2 if split == "valid" else 3], 50)

    def evaluate(self, model, method, context, split, batch_size, predictions_file=None, log=None):
        found = self.examples(split)
        ids = torch.tensor(np.stack([ids[:prefix] for ids, prefix in found]))
        answers = method.answer(model, Prompts(ids, torch.ones_like(ids), self.config.length))
        right = (answers == ids[:, :-1]).all(1).numpy()
        return {"digit_accuracy": 100 * float((answers == ids[:, :-1]).float().mean())}, {"all_right": right}

    def data_hash(self):
        return "repeat"


@pytest.fixture(scope="module", autouse=True)
def registered():
    """One line each."""
    before = dict(METHODS), dict(TASKS)
    register(METHODS, "step_back", f"{__name__}:StepBack")
    register(METHODS, "kept_token", f"{__name__}:Pause")
    register(METHODS, "foresight", f"{__name__}:Foresight")
    register(TASKS, "repeat", f"{__name__}:Repeat")
    yield
    for names, was in zip((METHODS, TASKS), before, strict=True):
        names.clear()
        names.update(was)


@pytest.fixture
def scale():
    """The smoke scale, with what an exercise adds to its YAML."""
    return load_scale(ROOT, "smoke")


def finished(spec, runs):
    """The record of a run and its folder."""
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    folder = records.seed_folder(runs, spec, spec.seeds[0])
    return records.read(folder / "metrics.json"), folder


def last(record):
    """Test metrics of the last model."""
    return records.checkpoint_metrics(record, "last")


def scored(metrics):
    """What the task measures; predictions ahead are the method's."""
    return {name: value for name, value in metrics.items() if "_ahead_" not in name}


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def slowly(model, vectors, length, second=False):
    """Greedy ids behind the input vectors [P, d] of a prompt, the whole sequence again for each token."""
    table, found = model.get_input_embeddings().weight, []
    for step in range(length):
        logits = model(inputs_embeds=vectors[None], use_cache=False).logits[0, -1]
        found.append(int(logits.sort(descending=True).indices[1 if second and step == 0 else 0]))
        vectors = torch.cat([vectors, table[found[-1]][None]])
    return found


def test_a_method_without_training_starts_from_another_run(scale, tmp_path):
    """Walks, then MuToR on graphs, then no step at all and an answer of its own."""
    scale.recipes["none"] = {**scale.recipes["star_graph"], "steps": 0}
    base = {"data": "g2x3", "method": "mutor", "settings": {"d_max": 3}}
    scale.datasets["again"] = replace(scale.datasets["g2x3"], recipe="none", base=base)
    spec = make_spec(scale, "again", "gpt2-2x32", "step_back", {}, (7,))
    record, folder = finished(spec, tmp_path)
    theirs = records.seed_folder(tmp_path, spec.base, 7)
    trained = records.read(theirs / "metrics.json")
    assert record["steps"] == record["tokens"] == record["seconds_training"] == record["added_parameters"] == 0
    assert record["curve"] == [] and [c["names"] for c in record["checkpoints"]] == [["best", "last"]]
    assert trained["steps"] == 20 and record["weights_hash"] == trained["weights_hash"]
    assert sorted(f.name for f in folder.iterdir() if f.is_dir()) == ["last"] and not (folder / "last/method").exists()
    model, task = AutoModelForCausalLM.from_pretrained(folder / "last").eval(), StarGraph(spec.task_config)
    table, solved = model.get_input_embeddings().weight, []
    with torch.no_grad():
        for ids, prefix in task.examples("test"):
            solved.append(slowly(model, table[torch.tensor(ids[:prefix])], 3, second=True) == ids[prefix:].tolist())
    assert records.problem_scores(record, "last", "solve_rate").tolist() == solved
    greedy, _ = finished(make_spec(scale, "again", "gpt2-2x32", "step_back", {"rank": 1}, (7,)), tmp_path)
    assert (
        scored(last(greedy)) == scored(last(trained)) and last(greedy)["accuracy_at_1"] != last(record)["accuracy_at_1"]
    )


def test_a_recipe_of_no_epochs_scores_the_model_as_it_starts(scale, tmp_path):
    pytest.importorskip("lm_eval")
    scale.recipes["text"] |= {"epochs": 0}
    spec = make_spec(scale, "gsm8k", "llama-2x32", "lora_mutor", {}, (7,))
    record, folder = finished(replace(spec, base=None), tmp_path)
    assert (record["steps"], record["curve"], record["examples"]) == (0, [], 96)
    assert record["added_parameters"] > 0 and len((folder / "predictions-last.jsonl").read_text().splitlines()) == 24
    assert Recipe(epochs=0, batch_size=10, learning_rate=1e-3).for_size(None).steps == 0
    assert Recipe(steps=0, batch_size=10, learning_rate=1e-3, eval_every=None).for_size(3).steps == 0
    with pytest.raises(ValueError, match=r"epochs: 0\.001 of 5 steps are none"):
        Recipe(epochs=0.001, batch_size=10, learning_rate=1e-3).for_size(50)


def test_a_token_that_is_kept_at_inference(scale, tmp_path):
    """Scored with its weights, which are saved beside the plain model and load again to the same answers."""
    spec = make_spec(scale, "g2x3", "gpt2-2x32", "kept_token", {}, (7,))
    record, folder = finished(replace(spec, recipe=replace(spec.recipe, learning_rate=0.03)), tmp_path)
    assert record["added_parameters"] == 32 and not any("mtp" in name for name in weights(folder / "last"))
    plain = AutoModelForCausalLM.from_pretrained(folder / "last").eval()
    table, task = plain.get_input_embeddings().weight.detach().clone(), StarGraph(spec.task_config)
    context = Context(seed=7, pad_id=task.pad_id)
    without, _ = task.evaluate(plain, NextToken(None), context, "test", 100)
    method = Pause(NextTokenConfig())
    model = method.load_own(plain, folder / "last/method")
    row = model.mtp["pause"].weight.detach()
    metrics, scores = task.evaluate(model, method, context, "test", 100)
    assert metrics == scored(last(record)) and metrics["loss"] != without["loss"]
    assert scores["solve_rate"].tolist() == records.problem_scores(record, "last", "solve_rate").tolist()
    with torch.no_grad():
        found = task.examples("test")[:20]
        ids = torch.tensor(np.stack([ids[:prefix] for ids, prefix in found]))
        answers = method.answer(model, Prompts(ids, torch.ones_like(ids), 3))
        fresh = AutoModelForCausalLM.from_pretrained(folder / "last").eval()
        assert answers.tolist() == [slowly(fresh, torch.cat([table[line], row]), 3) for line in ids]
        losses, right = [], []
        for line, prefix in task.examples("test"):  # the right answers behind the token
            vectors = torch.cat([table[torch.tensor(line[:prefix])], row, table[torch.tensor(line[prefix:])]])
            logits = fresh(inputs_embeds=vectors[None]).logits[0, prefix : len(line)]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(line[prefix:])))
            right.append(logits.argmax(-1).numpy() == line[prefix:])
    forced = [metrics[f"forced_accuracy_at_{i}"] for i in (1, 2, 3)]
    assert forced == (100 * np.mean(right, axis=0)).tolist() and len({*forced}) > 1
    assert metrics["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    (folder / "metrics.json").unlink()  # killed between training and scores
    again, _ = finished(spec := replace(spec, recipe=replace(spec.recipe, learning_rate=0.03)), tmp_path)
    assert last(again) == last(record)
    shutil.rmtree(folder / "last/method")
    with pytest.raises(ValueError, match=r"last/method: has no weights\.safetensors, the weights that Pause adds"):
        Pause(NextTokenConfig()).load_own(AutoModelForCausalLM.from_pretrained(folder / "last"), folder / "last/method")


def test_a_method_measures_by_itself(scale, tmp_path, tools):
    """On the validation set in the curve, on the test set in each checkpoint, by the heads that export leaves out."""
    spec = make_spec(scale, "g2x3", "gpt2-2x32", "foresight", {"d_max": 3, "a": 0.5}, (7,))
    spec = replace(spec, recipe=replace(spec.recipe, keep_steps=(10,), learning_rate=0.01))
    record, folder = finished(spec, tmp_path)
    curve = {e["step"]: e["eval_accuracy_two_ahead"] for e in record["curve"] if "eval_solve_rate" in e}
    task = StarGraph(spec.task_config)

    def by_hand(name, split):
        """In a loop over sequences: the first head, under a causal mask, then norm and output layer."""
        model, right = AutoModelForCausalLM.from_pretrained(folder / name).eval(), []
        method = Foresight(spec.method_config)
        method.load_own(model, folder / name / "method")
        _, norm, head, layer = tools.parts_of(model)
        for ids, prefix in task.examples(split):
            mask = tools.prefix_mask(len(ids), prefix, False)
            hidden = layer(model.mtp["heads"][0], tools.trunk_hidden(model, ids.tolist(), mask), mask)
            best = head(norm(hidden))[0].argmax(-1).tolist()
            right += [best[i] == ids[i + 2] for i in range(prefix - 1, len(ids) - 2)]
        return 100 * sum(right) / len(right)

    with torch.no_grad():
        assert curve == {10: by_hand("step10", "valid"), 20: by_hand("last", "valid")}
        tested = {c["step"]: c["metrics"]["accuracy_two_ahead"] for c in record["checkpoints"]}
        assert tested == {10: by_hand("step10", "test"), 20: by_hand("last", "test")}
    assert 0 < curve[20] < 100 and len({*curve.values(), *tested.values()}) > 2
    plain, _ = finished(make_spec(scale, "g2x3", "gpt2-2x32", "next_token", {}, (7,)), tmp_path)
    assert "accuracy_two_ahead" not in last(plain)


def test_a_metric_of_the_tasks_name_is_refused(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(Foresight, "metrics", lambda *args: {"loss": 1.0})
    with pytest.raises(ValueError, match="foresight: metrics: 'loss' is a metric of the task"):
        finished(make_spec(scale, "g2x3", "gpt2-2x32", "foresight", {"d_max": 3}, (7,)), tmp_path)


def test_own_weights_are_loaded_with_their_settings_only(tiny, tmp_path):
    made = Foresight(from_mapping(Foresight.Config, {"d_max": 3}, "foresight"))
    model = made.attach(tiny())
    made.save_own(model, tmp_path / "method")
    expected = {name: value.clone() for name, value in model.mtp.state_dict().items()}
    again = Foresight(from_mapping(Foresight.Config, {"d_max": 3}, "foresight")).load_own(tiny(), tmp_path / "method")
    assert all(torch.equal(value, expected[name]) for name, value in again.mtp.state_dict().items())
    assert json.loads((tmp_path / "method/method.json").read_text())["settings"] == {"d_max": 3}
    with pytest.raises(ValueError, match=r"was saved with settings \{'d_max': 3\}, not with \{\}"):
        Foresight(from_mapping(Foresight.Config, {"d_max": 2}, "foresight")).load_own(tiny(), tmp_path / "method")
    plain = NextToken(NextTokenConfig())
    plain.save_own(plain.attach(tiny()), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists() and not hasattr(plain.load_own(tiny(), tmp_path / "nothing"), "mtp")


def test_a_task_is_one_class(scale, tmp_path):
    """Of new tokens, with a base class that says what else a run asks of it."""
    recipe = {"epochs": 3, "batch_size": 20, "learning_rate": 0.01, "eval_every": 30, "log_every": 10, "save_every": 30}
    scale.recipes["repeat"] = recipe
    scale.datasets["repeat"] = replace(scale.datasets["g2x3-walks"], task="repeat", options={}, recipe="repeat")
    for method, settings in (("mutor", {"d_max": 2}), ("teacherless", {}), ("kept_token", {})):
        record, _ = finished(make_spec(scale, "repeat", "gpt2-2x32", method, settings, (7,)), tmp_path)
        assert (record["train_data_name"], record["steps"], record["examples"]) == ("repeat 3 digits", 60, 400)
        assert len(records.problem_scores(record, "last", "all_right")) == 50
        assert last(record)["digit_accuracy"] > 12  # of ten digits, and learned a little


def test_prompts_that_can_not_be_answered_so_are_refused(tiny):
    ids = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[0, 1, 1]])
    for prompts in (Prompts(ids, padded, 2, compiled=True), Prompts(ids, ids * 0 + 1, 2, end_id=4, compiled=True)):
        with pytest.raises(ValueError, match="compiled: not with padding or an end token"):
            decode(tiny(), prompts)
