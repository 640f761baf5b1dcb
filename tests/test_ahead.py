"""Predictions of x_(t+k) against plain loops that are given the tokens up to t and nothing else."""

import numpy as np
import pytest
import torch
from mutor.baselines.joint_mtp import JointMTP, JointMTPConfig
from mutor.baselines.next_latent import NextLatent, NextLatentConfig
from mutor.baselines.next_token import NextToken, NextTokenConfig
from mutor.baselines.parallel_mtp import ParallelMTP, ParallelMTPConfig
from mutor.baselines.sequential_mtp import SequentialMTP, SequentialMTPConfig
from mutor.baselines.teacherless import Teacherless, TeacherlessConfig

from mutor.config.runs import Cell
from mutor.mtp import ahead
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR
from mutor.mtp.mutor_images import MuToR2D, MuToR2DConfig

EXAMPLES = [
    (np.random.default_rng(length).integers(3, 61, length), prefix)
    for length, prefix in [(11, 4), (7, 2), (9, 1), (8, 6), (6, 5)]
]
BOTH = pytest.mark.parametrize("prefix_lm", [False, True])
TWO = pytest.mark.parametrize("family", ["llama", "gpt2"])


def predicted(method, model, prefix_lm, examples=EXAMPLES):
    """(sequence, t, k) -> logits [V], as the method gives them, all sequences in one layout."""
    rows = collate([Example(ids, prefix) for ids, prefix in examples], 0)
    layout, out = method.eval_layout(rows, Context(prefix_lm=prefix_lm)), {}
    with torch.no_grad():
        for found in method.ahead(model, layout):
            for where, logits in zip(found.index.tolist(), found.logits, strict=True):
                key = (*divmod(where, layout.ids.shape[1]), found.distance)
                assert key not in out
                out[key] = logits
    return out


def places(ks, examples=EXAMPLES):
    """(sequence, t, k) wherever x_(t+k) is in the answer, and an answer token follows t."""
    return {(n, t, k) for n, (ids, prefix) in enumerate(examples) for k in ks for t in range(prefix - 1, len(ids) - k)}


def equal(tools, found, theirs):
    """Up to a constant."""
    tools.close(found.log_softmax(-1), theirs.float().log_softmax(-1))


def sequences(found):
    """The places of predictions with the tokens up to t, and the prefix."""
    for (n, t, k), logits in sorted(found.items()):
        ids, prefix = EXAMPLES[n]
        yield ids[: t + 1].tolist(), prefix, k, logits


@BOTH
def test_next_tokens_alone(tiny, tools, family, prefix_lm):
    """A method that adds nothing knows the next token; one that is fed dummies knows it from the prompt."""
    model, method = tiny(family), NextToken(NextTokenConfig())
    method.attach(model)
    found = predicted(method, model, prefix_lm)
    assert found.keys() == places([1])
    for ids, prefix, _, logits in sequences(found):
        equal(tools, logits, tools.plain_logits(model, ids, prefix, prefix_lm)[-1])
    dummies = Teacherless(TeacherlessConfig())
    dummies.attach(model)
    for ids, prefix, _, logits in sequences(predicted(dummies, model, prefix_lm)):
        ids[prefix:] = [0] * (len(ids) - prefix)
        equal(tools, logits, tools.plain_logits(model, ids, prefix, prefix_lm)[-1])


@TWO
@BOTH
def test_heads(tiny, tools, family, prefix_lm):
    """Head k on the last hidden state of the tokens up to t."""
    model, method = tiny(family), ParallelMTP(ParallelMTPConfig(d_max=4))
    tools.attach(method, model)
    _, norm, head, run = tools.parts_of(model)
    found = predicted(method, model, prefix_lm)
    assert found.keys() == places([1, 2, 3, 4])
    with torch.no_grad():
        for ids, prefix, k, logits in sequences(found):
            mask = tools.prefix_mask(len(ids), prefix, prefix_lm)
            hidden = tools.trunk_hidden(model, ids, mask)
            hidden = hidden if k == 1 else run(model.mtp["heads"][k - 2], hidden, mask)
            equal(tools, logits, head(norm(hidden))[0, -1])


def test_own_output_layers(tiny, tools):
    """Head k's own output layer on the state that the model's reads."""
    model, method = tiny("llama"), ParallelMTP(ParallelMTPConfig(d_max=4, head="output"))
    tools.attach(method, model)
    _, norm, head, _ = tools.parts_of(model)
    with torch.no_grad():
        for ids, prefix, k, logits in sequences(predicted(method, model, True)):
            hidden = tools.trunk_hidden(model, ids, tools.prefix_mask(len(ids), prefix, True))
            equal(tools, logits, (head if k == 1 else model.mtp["heads"][k - 2])(norm(hidden))[0, -1])


def root_mean_square(x, weight):
    """DeepSeek-V3's RMSNorm."""
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@TWO
@BOTH
def test_modules_on_their_own_drafts(tiny, tools, family, prefix_lm):
    """The tokens up to t, behind them what the model and its modules hold likeliest: equations 21 to 25 again."""
    model, method = tiny(family), SequentialMTP(SequentialMTPConfig(d_max=4))
    tools.attach(method, model)
    _, norm, head, run = tools.parts_of(model)
    table, found, wrong = model.get_input_embeddings().weight, predicted(method, model, prefix_lm), 0
    assert found.keys() == places([1, 2, 3, 4])
    with torch.no_grad():
        for ids, prefix, k, logits in sequences(found):
            mask, known = tools.prefix_mask(len(ids), prefix, prefix_lm), list(ids)
            hidden = tools.trunk_hidden(model, ids, mask)
            theirs = head(norm(hidden))[0, -1]
            for depth in range(1, k):
                known.append(int(theirs.argmax()))
                module = model.mtp["depths"][depth - 1]
                states = root_mean_square(hidden[0], module["hidden_norm"].weight)
                tokens = root_mean_square(table[known[depth:]], module["token_norm"].weight)
                joined = torch.cat([states, tokens], -1) @ module["projection"].weight.T
                hidden = run(module["layer"], joined[None], mask)
                theirs = head(norm(hidden))[0, -1]
            equal(tools, logits, theirs)
            wrong += known[len(ids) :] != EXAMPLES_AFTER[tuple(ids)][: k - 1]
    assert wrong > 40  # drafts, not the true tokens


EXAMPLES_AFTER = {tuple(ids[:t].tolist()): ids[t:].tolist() for ids, _ in EXAMPLES for t in range(1, len(ids))}


@TWO
@BOTH
@pytest.mark.parametrize("embedding", ["shared", "per_offset"])
def test_registers(tiny, tools, family, prefix_lm, embedding):
    """One register of offset k behind the tokens up to t; trained are 2 and 3, so that 1 and 4 are not asked of one."""
    model, method = (
        tiny(family),
        MuToR.of(d_min=2, d_max=3, register_embedding=embedding, placement="every", registers=2),
    )
    tools.attach(method, model)
    vectors, table = model.mtp["registers"].weight, model.get_input_embeddings().weight
    found = predicted(method, model, prefix_lm)
    assert found.keys() == places([1, 2, 3])
    with torch.no_grad():
        for ids, prefix, k, logits in sequences(found):
            if k == 1:
                equal(tools, logits, tools.plain_logits(model, ids, prefix, prefix_lm)[-1])
                continue
            vector = vectors[k - 2 if embedding == "per_offset" else 0]
            mask = tools.prefix_mask(len(ids) + 1, prefix, prefix_lm)
            given = {"inputs_embeds": torch.cat([table[torch.tensor(ids)], vector[None]])[None], "use_cache": False}
            position = torch.tensor([[*range(len(ids)), len(ids) - 1 + k - 1]])
            theirs = model(**given, position_ids=position, attention_mask=mask[None, None]).logits
            equal(tools, logits, theirs[0, -1])


def test_predicted_states_on_their_own_drafts(tiny, tools):
    """The network rolls from the state of the tokens up to t, and reads the token that each state predicts."""
    model, method = tiny("llama"), NextLatent(NextLatentConfig(horizon=3))
    tools.attach(method, model)
    _, norm, head, _ = tools.parts_of(model)
    first, weights = model.mtp["dynamics"][0].weight, [model.mtp["dynamics"][i].weight for i in (1, 3, 5)]
    table, found, wrong = model.get_input_embeddings().weight, predicted(method, model, False), 0
    assert found.keys() == places([1, 2, 3, 4])
    with torch.no_grad():
        for ids, prefix, k, logits in sequences(found):
            mask, known = tools.prefix_mask(len(ids), prefix, False), list(ids)
            state = norm(tools.trunk_hidden(model, ids, mask))[0, -1]
            for _ in range(k - 1):
                known.append(int(head(state).argmax()))
                both = torch.cat([table[known[-1]], state])
                inner = both / (both.pow(2).mean() + 1e-5).sqrt() * first
                for number, weight in enumerate(weights):
                    inner = weight @ (torch.nn.functional.gelu(inner) if number else inner)
                state = state + inner
            equal(tools, logits, head(state))
            wrong += known[len(ids) :] != EXAMPLES_AFTER[tuple(ids)][: k - 1]
    assert wrong > 40


def test_attention_over_its_own_drafts(tiny, tools):
    """Entry by entry, on a sequence that ends with the draft before."""
    model, method = tiny("gpt2"), JointMTP(JointMTPConfig(horizon=3))
    tools.attach(method, model)
    _, norm, head, _ = tools.parts_of(model)
    table, found, wrong = model.get_input_embeddings().weight, predicted(method, model, False), 0
    assert found.keys() == places([1, 2, 3, 4])
    with torch.no_grad():
        for ids, prefix, k, logits in sequences(found):
            hidden = norm(tools.trunk_hidden(model, ids, tools.prefix_mask(len(ids), prefix, False)))[0, -1]
            known, state = [ids[-1]], hidden
            for _ in range(k - 1):
                known.append(int(head(state).argmax()))
                state = short_attention(model.mtp, hidden, table[known])
            equal(tools, logits, head(state))
            wrong += known[1:] != EXAMPLES_AFTER[tuple(ids)][: k - 1]
    assert wrong > 40


def short_attention(mtp, hidden, tokens):
    """[d]: what the last of so many tokens reads from those before it and itself."""
    part, bare, out = mtp["planner"], mtp["bare"], []
    entries = part["combine"](tokens + bare["gamma"] * hidden)
    query, key, value = ((entries @ part[name].weight.T).chunk(4, -1) for name in ("query", "key", "value"))
    for number in range(4):
        scores = query[number][-1] @ key[number].T / query[number].shape[1] ** 0.5
        scores = scores + bare["bias"][number, len(tokens) - 2, : len(tokens)]
        out.append(scores.softmax(0) @ value[number])
    mixed = torch.cat(out) @ part["output"].weight.T + hidden
    return mixed / (mixed.pow(2).mean() + 1e-5).sqrt() * part["norm"].weight


def test_registers_on_a_grid_look_along_their_row():
    assert list(MuToR.of(d_min=3, d_max=5).reach) == [3, 4, 5]
    assert list(MuToR2D(MuToR2DConfig(d_max=4)).reach) == [1, 2, 3]


@pytest.mark.parametrize("d_max", [1, 4])
def test_registers_at_the_end_of_the_models_positions(tiny, tools, d_max):
    """The longest sequence has as many tokens as the model has positions; no register stands beyond."""
    model, method = tiny("gpt2", n_positions=11), MuToR.of(d_max=d_max)
    tools.attach(method, model)
    assert predicted(method, model, False).keys() == places(range(1, d_max + 1))


METHODS = [
    (ParallelMTP, ParallelMTPConfig(d_max=3)),
    (SequentialMTP, SequentialMTPConfig(d_max=4)),
    (MuToR, MuToR.Config(d_max=3)),
    (NextLatent, NextLatentConfig(horizon=3)),
    (JointMTP, JointMTPConfig(horizon=2)),
]


@pytest.mark.parametrize(("cls", "config"), METHODS)
def test_parts_change_nothing(tiny, tools, monkeypatch, cls, config):
    """Two rows of logits and twenty tokens at a time."""
    model, method = tiny("llama"), cls(config)
    tools.attach(method, model)
    whole = predicted(method, model, True)
    monkeypatch.setattr(ahead, "rows_at_once", lambda trunk, hidden: 2)
    monkeypatch.setattr(ahead, "TOKENS", 20)
    parts = predicted(method, model, True)
    assert parts.keys() == whole.keys()
    for key, logits in whole.items():
        tools.close(parts[key], logits)


@pytest.mark.parametrize(("cls", "config"), METHODS)
def test_answers_too_short_are_not_asked(tiny, tools, cls, config):
    model, method = tiny("llama"), cls(config)
    tools.attach(method, model)
    short = [(np.array([5, 6, 7]), 2), (np.array([8, 9]), 1)]
    assert predicted(method, model, False, short).keys() == places([1], short)
    with torch.no_grad():
        metrics = method.metrics(model, short, Context(), 2)
    assert set(metrics) == {
        "accuracy_ahead_1",
        "top5_accuracy_ahead_1",
        "loss_ahead_1",
    }


def method_reach(config):
    """The distances k at which a method predicts."""
    return range(1, 1 + getattr(config, "d_max", 1 + getattr(config, "horizon", 0)))


@pytest.mark.parametrize(("cls", "config"), [*METHODS, (NextToken, NextTokenConfig())])
def test_metrics_by_hand(tiny, tools, monkeypatch, cls, config):
    """Of the first four sequences, three at a time, each k over its own predictions."""
    monkeypatch.setattr(ahead, "EXAMPLES", 4)
    model, method = tiny("llama"), cls(config)
    tools.attach(method, model)
    examples = [(ids.copy(), prefix) for ids, prefix in EXAMPLES]
    for (n, t, k), logits in predicted(method, model, False).items():
        if k == max(method_reach(config)) and t == examples[n][1] - 1:  # so that some are right, some among five
            examples[n][0][t + k] = int(logits.topk(3).indices[2 * (n % 2)])
    seen = {}
    with torch.no_grad():
        for (n, t, k), logits in predicted(method, model, False, examples[:4]).items():
            best, target = logits.sort(descending=True).indices.tolist(), int(examples[n][0][t + k])
            loss = -float(logits.double().log_softmax(-1)[target])
            seen.setdefault(k, []).append((100.0 * (best[0] == target), 100.0 * (target in best[:5]), loss))
        metrics = method.metrics(model, examples, Context(), 3)
    metrics = {name: value for name, value in metrics.items() if not name.startswith(("accepted", "conditional"))}
    names = ("accuracy_ahead", "top5_accuracy_ahead", "loss_ahead")
    wanted = {
        f"{name}_{k}": values
        for k, all_of in seen.items()
        for name, values in zip(names, zip(*all_of, strict=True), strict=True)
    }
    assert metrics == {name: pytest.approx(float(np.mean(values)), rel=1e-5) for name, values in wanted.items()}
    last = max(seen)
    assert 0 < metrics[f"accuracy_ahead_{last}"] < metrics[f"top5_accuracy_ahead_{last}"] < 100


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("accuracy_ahead_2", "percent"),
        ("loss_ahead_2", "nats"),
        ("coverage_ahead_4", "percent"),
        ("accepted_ahead_2", "percent"),
        ("loss", "nats"),
        ("accuracy", "percent"),
    ],
)
def test_units(metric, unit):
    assert Cell(None, None, metric, "last").unit == unit
