"""Which tokens are predicted when: schedules of d_max, leaps; and which targets count."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_baselines import combine, cross_entropy, root_mean_square
from test_faults import Killed, kill
from test_trunk import finished, made

from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR
from mutor.mtp.segments import entropies, within_segments
from mutor.mtp.settings import AheadSettings, HeadSettings, Progress
from mutor.results import records
from mutor.training.trainer import MethodTrainer

HEADS = pytest.mark.parametrize("name", ["parallel_mtp", "sequential_mtp"])


def reaches(config, steps):
    """The furthest token of each step."""
    return [config.reach(Progress(step, steps)) for step in range(steps)]


def test_reach_is_the_published_formula():
    """With epochs for steps: forward min(kmax, floor(e / (E / kmax)) + 1), reverse max(1, kmax - the same floor)."""
    for most in (2, 3, 4, 8):
        for steps in (1, 5, 8, 24, 100):
            floors = [math.floor(e * most / steps) for e in range(steps)]
            forward, reverse = (HeadSettings(d_max=most, d_max_schedule=kind) for kind in ("forward", "reverse"))
            assert reaches(forward, steps) == [min(most, floor + 1) for floor in floors]
            assert reaches(reverse, steps) == [max(1, most - floor) for floor in floors]
    assert reaches(HeadSettings(d_max=5, leap=2, d_max_schedule="forward"), 6) == [1, 1, 3, 3, 5, 5]
    assert reaches(made("mutor", d_min=2, d_max=4, d_max_schedule="reverse").config, 6) == [4, 4, 3, 3, 2, 2]
    assert reaches(made("mutor_2d", d_max=4, d_max_schedule="forward").config, 6) == [2, 2, 3, 3, 4, 4]
    assert reaches(AheadSettings(d_max=4), 3) == [4, 4, 4]


def drawn(name, step=0, steps=4, trunk=None, **settings):
    """{offset: number} of many samples at a step."""
    method = made(name, **settings)
    method.trunk = trunk or SimpleNamespace(config=SimpleNamespace(columns=10))
    offset, number = method.offsets(torch.arange(500)[:, None], Context(progress=Progress(step, steps)))
    return dict(zip(offset.flatten().tolist(), number.flatten().tolist(), strict=True)), method.different_offsets


def test_offsets_of_a_schedule_and_of_leaps():
    """Numbers, which choose an embedding, stay an offset's own."""
    assert drawn("mutor", d_max=5, leap=2) == ({1: 0, 3: 1, 5: 2}, 3)
    assert drawn("mutor", d_min=2, d_max=8, leap=3) == ({2: 0, 5: 1, 8: 2}, 3)
    forward = {"d_max": 4, "d_max_schedule": "forward"}
    assert [set(drawn("mutor", step, **forward)[0]) for step in range(4)] == [{1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4}]
    assert drawn("mutor", 3, d_min=2, d_max=5, d_max_schedule="reverse") == ({2: 0}, 4)
    for step in range(4):
        method, rows = made("mutor", **forward, offsets="all"), collate([Example(np.arange(9), 2)], 0)
        method.trunk = SimpleNamespace(vocabulary=61)
        layout = method.train_layout(rows, Context(progress=Progress(step, 4)))
        offset = (layout.position - layout.causal_index + 1)[layout.register]
        assert sorted(set(offset.tolist())) == list(range(1, step + 2))
    whole = drawn("mutor_2d", d_max=3)[0]
    assert len(whole) == 8
    first, count = drawn("mutor_2d", 0, d_max=3, d_max_schedule="forward")
    assert set(first) == {1, 10, 11} and first.items() < whole.items() and count == 8


def test_layouts_are_of_the_step_that_trains_on_them(tmp_path, monkeypatch):
    """A data loader is ahead of training; the sample's number says the step."""
    real, seen = MuToR.compute_loss, []

    def watched(self, model, layout, loss_targets=None):
        offset = (layout.position - layout.causal_index + 1)[layout.register]
        seen.append((self.progress.step, int(offset.max())))
        assert self.progress.steps == 12 and int(offset.max()) <= self.config.reach(self.progress)
        return real(self, model, layout, loss_targets)

    monkeypatch.setattr(MuToR, "compute_loss", watched)
    recipe = {"steps": 12, "log_every": 3, "save_every": 3, "eval_every": 3, "accumulate": 2}
    finished("mutor", tmp_path, recipe=recipe, d_max=3, d_max_schedule="reverse")
    assert [step for step, _ in seen] == [step for step in range(12) for _ in range(2)]
    assert [max(far for step, far in seen if step // 4 == part) for part in range(3)] == [3, 2, 1]


@HEADS
def test_idle_heads_play_no_part(tiny, tools, batch, name):
    """At reach 2 of 4 the loss is that of d_max 2; idle heads get zeros and rest."""
    big, small = tiny("llama"), tiny("llama")
    method, two = made(name, d_max=4, d_max_schedule="reverse"), made(name, d_max=2)
    tools.attach(method, big)
    tools.attach(two, small)
    part = "heads" if name == "parallel_mtp" else "depths"
    small.mtp[part][0].load_state_dict(big.mtp[part][0].state_dict())
    layout = method.train_layout(batch.rows, Context())
    for step, active in ((0, 3), (2, 1), (3, 0)):
        method.progress = Progress(step, 4)
        total, parts = method.compute_loss(big, layout)
        resting = {id(p) for p in method.resting()}
        idle = {n for n, p in big.named_parameters() if id(p) in resting}
        assert idle == {
            n for n, _ in big.named_parameters() if n.startswith(f"mtp.{part}") and int(n.split(".")[2]) >= active
        }
        assert [float(v) > 0 for n, v in parts.items() if n != "next_token"] == [k < active for k in range(3)]
        big.zero_grad()
        total.backward()
        assert all((p.grad is not None) and (n not in idle or not p.grad.any()) for n, p in big.named_parameters())
        if active == 1:
            ours = {n: p.grad for n, p in big.named_parameters() if n not in idle}
            theirs, _ = two.compute_loss(small, layout)
            tools.close(total, theirs)
            tools.same_gradients(ours, tools.gradients(small, theirs))


def test_a_killed_run_goes_on_with_its_schedule(tmp_path, monkeypatch):
    """Bit for bit; the optimiser's memory of a head begins when the head does."""
    recipe = {"steps": 12, "log_every": 3, "save_every": 3, "eval_every": 12}
    settings = {"d_max": 3, "d_max_schedule": "forward", "a_schedule": "quarter_sine"}
    name = "sequential_mtp"
    whole, _, spec = finished(name, tmp_path / "whole", recipe=recipe, **settings)
    with monkeypatch.context() as patch:
        kill(patch, MethodTrainer, "_save_checkpoint", lambda self, *_: self.state.global_step == 12)
        with pytest.raises(Killed):
            finished(name, tmp_path / "killed", recipe=recipe, **settings)
    left = records.seed_folder(tmp_path / "killed", spec, 1) / "checkpoints/checkpoint-9/optimizer.pt"
    steps = Counter(int(state["step"]) for state in torch.load(left)["state"].values())
    assert steps.keys() == {9, 5, 1}
    killed, record, _ = finished(name, tmp_path / "killed", recipe=recipe, **settings)
    assert record["resumed"]
    for file in ("last/model.safetensors", "last/method/weights.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_modules_with_leaps_are_plain_loops(tiny, tools, family, batch):
    """Depth k joins x_(i + 1 + 2 (k - 1)), which depth k - 1 predicts, and predicts x_(i + 1 + 2 k)."""
    model, method = tiny(family), made("sequential_mtp", d_max=5, leap=2, a=0.3)
    tools.attach(method, model)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context()))
    _, norm, head, run = tools.parts_of(model)
    embedding, losses = model.get_input_embeddings().weight, [[] for _ in range(3)]
    for span in batch.spans:
        mask, length = tools.prefix_mask(len(span.ids), span.prefix, False), len(span.ids)
        hidden = tools.trunk_hidden(model, span.ids, mask)[0]
        for k in range(3):
            if k:
                module, known = model.mtp["depths"][k - 1], 1 + 2 * (k - 1)
                stop = min(len(hidden), length - known)
                tokens = root_mean_square(embedding[span.ids[known : known + stop]], module["token_norm"].weight)
                states = root_mean_square(hidden[:stop], module["hidden_norm"].weight)
                joined = torch.cat([states, tokens], -1) @ module["projection"].weight.T
                hidden = run(module["layer"], joined[None], mask[:stop, :stop])[0]
            logits = head(norm(hidden))
            losses[k] += [
                cross_entropy(logits[i], span.ids[i + 1 + 2 * k]) for i in range(span.prefix - 1, length - 1 - 2 * k)
            ]
    combine(tools, model, total, parts, ["depth_1", "depth_2"], losses, 0.3)


# targets beyond tokens that could not be foreseen


@pytest.mark.parametrize("name", ["parallel_mtp", "sequential_mtp", "mutor"])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_targets_beyond_high_entropy_count_nothing(tiny, tools, batch, name, per_sequence):
    """By loops over tokens, with entropies of the stock model; the loss is divided by all targets."""
    model = tiny("llama")
    entropy = []
    for span in batch.spans:
        logs = tools.plain_logits(model, span.ids, span.prefix, False).log_softmax(-1)
        entropy.append((-(logs.exp() * logs).sum(-1)).tolist())
    limit = float(
        np.median([h for line, span in zip(entropy, batch.spans, strict=True) for h in line[span.prefix - 1 :]])
    )
    settings = {"d_max": 4, "leap": 3} if name != "mutor" else {"d_max": 4, "offsets": "mixed"}
    method, free = (made(name, **settings, entropy_limit=value) for value in (limit, None))
    method.per_sequence = per_sequence
    tools.attach(method, model)
    layout = method.train_layout(batch.rows, Context(seed=3))
    out, targets = method.trunk(model, layout), method.loss_targets(layout)
    part = {"parallel_mtp": "head_4", "sequential_mtp": "depth_1", "mutor": "register"}[name]
    distance = None if name == "mutor" else 4
    kept = within_segments(method.trunk, out.normed, layout, targets, {part: distance}, limit)
    assert kept["next_token"] is targets["next_token"] and kept[part].count == targets[part].count
    shares = []
    for flat, before in zip(targets[part].index.tolist(), targets[part].share.tolist(), strict=True):
        row, column = divmod(flat, layout.ids.shape[1])
        at = int(layout.causal_index[row, column])
        number = next(n for n, s in enumerate(batch.spans) if s.row == row and s.start <= at < s.start + len(s.ids))
        here = at - batch.spans[number].start
        far = distance or int(layout.position[row, column]) - here + 1
        sure = all(entropy[number][t] <= limit for t in range(here, here + far - 1))
        shares.append(before * sure)
    assert kept[part].share.tolist() == pytest.approx(shares) and 0 < sum(map(bool, shares)) < len(shares)
    _, parts = method.compute_loss(model, layout)
    assert 0 < float(parts[part]) < float(free_loss(free, method, model, layout)[part])


def free_loss(free, method, model, layout):
    """The parts of the loss without a limit, of the same weights."""
    free.trunk, free.per_sequence = method.trunk, method.per_sequence
    for name in ("heads", "depths"):
        if hasattr(method, name):
            setattr(free, name, getattr(method, name))
    return free.compute_loss(model, layout)[1]


def test_an_offset_of_one_has_nothing_between(tiny, batch):
    model, method = tiny("llama"), made("mutor", d_max=2, entropy_limit=1e-9)
    method.attach(model)
    rows = collate([Example(span.example().ids, span.prefix, n) for n, span in enumerate(batch.spans)], 0)
    layout = method.train_layout(rows, Context(seed=1))
    kept = within_segments(
        method.trunk, method.trunk(model, layout).normed, layout, method.loss_targets(layout), {"register": None}, 1e-9
    )["register"]
    offset = (layout.position - layout.causal_index + 1).flatten()[kept.index]
    assert {*offset.tolist()} == {1, 2} and torch.equal(kept.share == 1, offset == 1)


def test_entropies_are_of_the_models_own_distribution(tiny):
    """In parts as at once; uniform logits have log V."""
    model = tiny("gemma2")
    method = made("mutor")
    method.attach(model)
    normed = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    logits = method.trunk.logits(normed)[0]
    wanted = torch.distributions.Categorical(logits=logits[[1, 3]]).entropy()
    assert torch.allclose(entropies(method.trunk, normed, torch.tensor([1, 3])), wanted.detach(), atol=1e-5)
    zero = entropies(method.trunk, normed * 0, torch.tensor([0]))
    assert float(zero) == pytest.approx(math.log(61), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("parallel_mtp", {"d_max": 4, "leap": 2}, "d_max: 4 is no number of leaps of 2 beyond 1"),
        ("mutor", {"d_min": 2, "d_max": 5, "leap": 2}, "d_max: 5 is no number of leaps of 2 beyond 2"),
        ("mutor", {"d_max": 1, "leap": 2}, "leap: 2 means nothing with d_max 1"),
        ("mutor", {"d_min": 3, "d_max": 3, "d_max_schedule": "forward"}, "d_max_schedule: forward means nothing"),
        ("mutor", {"d_max": 1, "entropy_limit": 2.0}, "entropy_limit: 2.0 means nothing with d_max 1"),
        ("mutor", {"entropy_limit": 0}, r"entropy_limit: 0\.0 is out of range"),
        ("mutor_2d", {"leap": 3}, "leap: 3 means nothing in two dimensions"),
        ("mutor_2d", {"d_min": 2}, "d_min: 2 means nothing in two dimensions"),
        ("mutor_2d", {"d_max": 2, "d_max_schedule": "reverse"}, "d_max_schedule: reverse means nothing with d_max 2"),
        ("parallel_mtp", {"trunk": "frozen", "d_max_schedule": "forward"}, "d_max_schedule: forward means nothing"),
        ("sequential_mtp", {"warm_up": 3, "d_max_schedule": "forward"}, r"warm_up: 3\.0 means nothing with d_max_sch"),
        ("parallel_mtp", {"hidden_rate": 3}, r"hidden_rate: 3\.0 means nothing with hidden 'last'"),
        ("parallel_mtp", {"head": "attention"}, "head: 'attention' .*; allowed: layer, output, linear, mlp"),
        ("parallel_mtp", {"latent_token": -0.1}, r"latent_token: -0\.1 is out of range"),
        ("mutor", {"register_lora": 4}, "register_lora: 4 means nothing with trunk 'trained'"),
        ("lora_mutor", {"register_lora": 4}, "register_lora: 4 means nothing with trunk 'lora'"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(name, settings, says):
    with pytest.raises(ValueError, match=says):
        made(name, **settings)


@pytest.mark.parametrize("settings", [{"warm_up": 2}, {"trunk_rate": 0.1}, {"d_max_schedule": "forward"}])
def test_a_plain_trainer_is_refused_what_it_cannot_follow(tiny, settings):
    method = made("mutor", **settings)
    method.attach(tiny())
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: .* a Trainer of transformers can't follow"):
        method.collator(0)


def test_a_plain_trainer_follows_the_weights_schedule(tiny):
    method = made("mutor", d_max=1, a=0.4, a_schedule="linear")
    model = method.attach(tiny()).train()
    collator = method.collator(0)
    collator.set_epoch(0)
    batch = collator([{"input_ids": [5, 9, 7], "prefix_length": 2}])
    labels, found = batch.pop("labels"), []
    for step in (0, 5):
        collator.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=10), None)
        logits = model(**batch).logits[0].detach()
        found.append(float(method.loss_from_outputs(None, labels).detach()))
    one, two = (float(F.cross_entropy(logits[at], torch.tensor(7))) for at in (1, 3))
    assert model.training and found == pytest.approx([0.6 * one + 0.4 * two, 0.8 * one + 0.2 * two], rel=1e-5)
