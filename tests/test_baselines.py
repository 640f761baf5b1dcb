"""The baselines against plain loops, one sequence at a time, that share no code with them."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from mutor.baselines.bag_of_words import BagOfWords, BagOfWordsConfig
from mutor.baselines.next_token import NextToken, NextTokenConfig
from mutor.baselines.parallel_mtp import ParallelMTP, ParallelMTPConfig
from mutor.baselines.pause import Pause, PauseConfig
from mutor.baselines.same_logits import SameLogits, SameLogitsConfig
from mutor.baselines.sequential_mtp import SequentialMTP, SequentialMTPConfig
from mutor.baselines.teacherless import Teacherless, TeacherlessConfig
from mutor.baselines.token_masking import TokenMasking, TokenMaskingConfig

from mutor.mtp.answers import Prompts, decode, decode_in_one_pass
from mutor.mtp.layout import IGNORE, Example, collate, regular, targets_ahead
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR, MuToRConfig

BOTH = pytest.mark.parametrize("prefix_lm", [False, True])
ALL = [
    (NextToken, NextTokenConfig()),
    (Teacherless, TeacherlessConfig()),
    (ParallelMTP, ParallelMTPConfig(d_max=3, a=0.2)),
    (SequentialMTP, SequentialMTPConfig(d_max=3, a=0.2)),
    (MuToR, MuToRConfig(d_max=1, a=0.2)),
    (Pause, PauseConfig(pauses=2)),
    (TokenMasking, TokenMaskingConfig(rate=0.5)),
    (SameLogits, SameLogitsConfig(d_max=3, weight=0.7)),
    (BagOfWords, BagOfWordsConfig(d_max=4)),
]


def cross_entropy(logits, target):
    """Minus log probability of one target, [V] logits."""
    return -torch.log_softmax(logits.float(), -1)[target]


@BOTH
def test_next_token_is_a_plain_loop(tiny, tools, family, batch, prefix_lm):
    """Each answer token from the tokens before it, on the stock model, one sequence at a time."""
    model, losses = tiny(family), []
    for span in batch.spans:
        logits = tools.plain_logits(model, span.ids, span.prefix, prefix_lm)
        losses += [cross_entropy(logits[i - 1], span.ids[i]) for i in range(span.prefix, len(span.ids))]
    theirs = torch.stack(losses).mean()
    wanted = tools.gradients(model, theirs)
    method = NextToken(NextTokenConfig())
    method.attach(model)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context(prefix_lm=prefix_lm)))
    tools.close(total, theirs)
    tools.close(parts["next_token"], theirs.detach())
    tools.same_gradients(tools.gradients(model, total), wanted)
    assert method.added_parameters(model) == 0


def test_targets_further_on_by_hand():
    """Heads start at the last prefix token; nothing crosses into another document or into padding."""
    rows = collate([Example(np.array([10, 11, 12, 13, 14]), 2), Example(np.array([20, 21, 22]), 1)], 0, 10)
    layout, n = regular(rows), IGNORE
    assert targets_ahead(layout, 1).tolist() == layout.target.tolist() == [[n, 12, 13, 14, n, 21, 22, n, n, n]]
    assert targets_ahead(layout, 2).tolist() == [[n, 13, 14, n, n, 22, n, n, n, n]]
    assert targets_ahead(layout, 3).tolist() == [[n, 14, n, n, n, n, n, n, n, n]]
    assert targets_ahead(layout, 4).tolist() == targets_ahead(layout, 99).tolist() == [[n] * 10]


def test_teacherless_layout(tiny):
    """Dummies in the answer's place, targets as ever."""
    method = Teacherless(TeacherlessConfig())
    method.attach(tiny())
    rows = collate([Example(np.array([10, 11, 12, 13, 14]), 2), Example(np.array([20, 21, 22]), 1)], 0)
    got, n = method.train_layout(rows, Context(pad_id=9)), IGNORE
    assert got.ids.tolist() == [[10, 11, 9, 9, 9], [20, 9, 9, 0, 0]]
    assert got.target.tolist() == [[n, 12, 13, 14, n], [21, 22, n, n, n]]
    assert got.position.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]


@BOTH
def test_teacherless_answers_in_one_pass(tiny, tools, family, prefix_lm):
    """The argmax behind the prefix and behind each dummy; the loss reads the same logits."""
    model, prefix, length = tiny(family), [[7, 9, 30, 4], [8, 3, 11, 50]], 5
    method = Teacherless(TeacherlessConfig())
    method.attach(model)
    ids = torch.tensor(prefix)
    got = method.answer(model, Prompts(ids, torch.ones_like(ids), length, pad_id=6, prefix_lm=prefix_lm))
    end = int(got[0, 2])
    ended = method.answer(model, Prompts(ids, torch.ones_like(ids), length, end, pad_id=6, prefix_lm=prefix_lm))
    losses = []
    for line, answer, short in zip(prefix, got.tolist(), ended.tolist(), strict=True):
        stop = answer.index(end) + 1 if end in answer else length
        assert short == answer[:stop] + [6] * (length - stop)
        logits = tools.plain_logits(model, line + [6] * (length - 1), 4, prefix_lm)[3:]
        assert logits.argmax(-1).tolist() == answer
        padded = torch.tensor([[5, 5, *line]])
        attended = torch.tensor([[0, 0, 1, 1, 1, 1]])
        alone = method.answer(model, Prompts(padded, attended, length, pad_id=6, prefix_lm=prefix_lm))
        assert alone.tolist() == [answer]
        losses += [cross_entropy(logits[j], answer[j]) for j in range(length)]
    rows = collate([Example(np.array(p + a), 4) for p, a in zip(prefix, got.tolist(), strict=True)], 6)
    total, _ = method.compute_loss(model, method.train_layout(rows, Context(pad_id=6, prefix_lm=prefix_lm)))
    tools.close(total, torch.stack(losses).mean())


@BOTH
def test_greedy_is_a_plain_loop(tiny, tools, family, prefix_lm):
    """No cache, the whole sequence again for each token."""
    model, prefix = tiny(family), [[7, 9, 30, 4, 0], [8, 0, 3, 11, 50]]
    wanted = []
    for line in prefix:
        ids = list(line)
        for _ in range(5):
            ids.append(int(tools.plain_logits(model, ids, 5, prefix_lm)[-1].argmax()))
        wanted.append(ids[5:])
    ids = torch.tensor(prefix)
    assert decode(model, Prompts(ids, torch.ones_like(ids), 5, prefix_lm=prefix_lm)).tolist() == wanted


@pytest.mark.parametrize("way", [decode, decode_in_one_pass])
def test_a_choice_is_asked_for_each_step_in_order(tiny, way):
    """Given float32 logits [B, V] and the step; what it says is the answer."""
    seen = []

    def choose(logits, step):
        seen.append((tuple(logits.shape), logits.dtype, step))
        return torch.tensor([3 + step, 13 + step])

    ids = torch.tensor([[7, 9, 30], [8, 5, 3]])
    answers = way(tiny("llama").bfloat16(), Prompts(ids, torch.ones_like(ids), 4, choose=choose))
    assert answers.tolist() == [[3, 4, 5, 6], [13, 14, 15, 16]]
    assert seen == [((2, 61), torch.float32, step) for step in range(4)]


def combine(tools, model, total, parts, names, losses, a):
    """The parts and the weighted total equal the loops' lists of losses, gradients included."""
    means = [torch.stack(some).mean() for some in losses]
    for name, mean in zip(["next_token", *names], means, strict=True):
        tools.close(parts[name], mean.detach())
    theirs = (1 - a) * means[0] + a * torch.stack(means[1:]).mean()
    tools.close(total, theirs)
    ours = tools.gradients(model, total)
    tools.same_gradients(ours, tools.gradients(model, theirs))
    assert all(float(g.abs().max()) > 0 for n, g in ours.items() if "mtp" in n and "k_proj.bias" not in n)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@BOTH
def test_parallel_heads_are_plain_loops(tiny, tools, family, batch, prefix_lm):
    """Head k at position i against x_(i+k), all on the trunk's hidden state: losses and gradients."""
    model, method = tiny(family), ParallelMTP(ParallelMTPConfig(d_max=4, a=0.3))
    tools.attach(method, model)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context(prefix_lm=prefix_lm)))
    _, norm, head, run = tools.parts_of(model)
    losses = [[] for _ in range(4)]
    for span in batch.spans:
        mask = tools.prefix_mask(len(span.ids), span.prefix, prefix_lm)
        hidden = tools.trunk_hidden(model, span.ids, mask)
        for k in range(1, 5):
            out = hidden if k == 1 else run(model.mtp["heads"][k - 2], hidden, mask)
            logits = head(norm(out))[0]
            losses[k - 1] += [
                cross_entropy(logits[i], span.ids[i + k])
                for i in range(span.prefix - 1, len(span.ids))
                if i + k < len(span.ids)
            ]
    combine(tools, model, total, parts, ["head_2", "head_3", "head_4"], losses, 0.3)


def root_mean_square(x, weight):
    """DeepSeek-V3's RMSNorm."""
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@BOTH
def test_sequential_modules_are_plain_loops(tiny, tools, family, batch, prefix_lm):
    """Equations 21 to 25 of DeepSeek-V3, each depth on the sequence cut to T - k: losses and gradients."""
    model, method = tiny(family), SequentialMTP(SequentialMTPConfig(d_max=3, a=0.3))
    tools.attach(method, model)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context(prefix_lm=prefix_lm)))
    _, norm, head, run = tools.parts_of(model)
    embedding, losses = model.get_input_embeddings().weight, [[] for _ in range(3)]
    for span in batch.spans:
        mask = tools.prefix_mask(len(span.ids), span.prefix, prefix_lm)
        hidden, length = tools.trunk_hidden(model, span.ids, mask)[0], len(span.ids)
        for k in range(3):
            if k:
                module, stop = model.mtp["depths"][k - 1], length - k
                weight = module["projection"].weight
                states = []
                for i in range(stop):
                    state = root_mean_square(hidden[i], module["hidden_norm"].weight)
                    token = root_mean_square(embedding[span.ids[i + k]], module["token_norm"].weight)
                    states.append(weight[:, :32] @ state + weight[:, 32:] @ token)
                if not states:
                    break
                hidden = run(module["layer"], torch.stack(states)[None], mask[:stop, :stop])[0]
            logits = head(norm(hidden))
            losses[k] += [cross_entropy(logits[i], span.ids[i + k + 1]) for i in range(span.prefix - 1, length - k - 1)]
    combine(tools, model, total, parts, ["depth_1", "depth_2"], losses, 0.3)


@pytest.mark.parametrize("cls", [ParallelMTP, SequentialMTP])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@BOTH
def test_no_depth_reads_what_it_predicts(tiny, tools, cls, family, prefix_lm):
    """Depth k at i: unchanged by x_(i+k+1) and all behind it; a module is changed by x_(i+k), a head only by x_i."""
    model, method, length, prefix = tiny(family), cls(cls.Config(d_max=4)), 10, 4
    tools.attach(method, model)
    ids = torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(0))

    def normed(new):
        layout, seen = method.train_layout(collate([Example(new.numpy(), prefix)], 0), Context(prefix_lm=prefix_lm)), []
        hook = method.trunk.norm.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        with torch.no_grad():
            method.compute_loss(model, layout)
        hook.remove()
        return torch.stack([out.view(length, -1) for out in seen])

    before = normed(ids)
    assert len(before) == 4
    for at in range(prefix, length):
        new = ids.clone()
        new[at:] = (ids[at:] + 7) % 58 + 3
        after = normed(new)
        for k in range(4):
            i = at - k - 1  # depth k predicts x_(i+k+1) there
            if i < prefix - 1:
                continue
            reads = i + 1 if cls is SequentialMTP or k == 0 else at  # the first position that may read x_at
            tools.close(after[k, prefix - 1 : reads], before[k, prefix - 1 : reads])
            assert float((after[k, reads] - before[k, reads]).abs().max()) > 1e-3


class Held:
    """What autograd saved, by weak reference, so that the live amount can be counted."""

    def __init__(self, tensor, live):
        self.tensor = tensor
        live["now"] += tensor.numel()
        live["peak"] = max(live["peak"], live["now"])
        weakref.finalize(self, lambda n: live.update(now=live["now"] - n), tensor.numel())


def test_only_one_head_is_alive_at_a_time(tiny, tools, batch):
    """Live saved activations do not grow with the number of heads."""
    peaks = {}
    for d_max in (2, 6):
        model, method = tiny(), ParallelMTP(ParallelMTPConfig(d_max=d_max))
        tools.attach(method, model)
        layout, live = method.train_layout(batch.rows, Context()), {"now": 0, "peak": 0}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, live=live: Held(t, live), lambda held: held.tensor):
            total, _ = method.compute_loss(model, layout)
        peaks[d_max] = live["peak"]
        total.backward()
        del total
        gc.collect()
        assert live["now"] == 0
    assert peaks[6] < 1.02 * peaks[2]


@pytest.mark.parametrize("cls", [ParallelMTP, SequentialMTP, MuToR, SameLogits])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_no_target_that_far_is_no_loss(tiny, tools, cls, per_sequence):
    """Answers shorter than d_max: finite losses and gradients, zero for what predicts nothing."""
    extra = {"d_min": 5} if cls is MuToR else {}
    model, method = tiny(), cls(cls.Config(d_max=6, **extra), per_sequence=per_sequence)
    tools.attach(method, model)
    rows = collate([Example(np.array([5, 6, 7]), 1), Example(np.array([8, 9]), 1)], 0)
    total, parts = method.compute_loss(model, method.train_layout(rows, Context(prefix_lm=True)))
    assert torch.isfinite(total) and float(parts["next_token"]) > 0
    names = {ParallelMTP: "head_6", SequentialMTP: "depth_5", MuToR: "register", SameLogits: "ahead_6"}
    assert float(parts[names[cls]]) == 0
    assert all(torch.isfinite(g).all() for g in tools.gradients(model, total).values())


@pytest.mark.parametrize("cls", [ParallelMTP, SequentialMTP])
@pytest.mark.parametrize("loaded", [False, True])
def test_new_layers_are_fresh(tiny, family, cls, loaded, tmp_path):
    """Drawn as the model draws its own, not copied from its last layer, all different; also in a loaded model."""
    model = tiny(family)
    if loaded:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    method = cls(cls.Config(d_max=3))
    torch.manual_seed(0)
    method.attach(model)
    stock = tiny(family, scale=1.0, seed=1)
    wanted = dict((stock.transformer.h if family == "gpt2" else stock.base_model.layers)[0].named_parameters())
    trunk_last = dict(method.trunk.layers[-1].named_parameters())
    layers = [*method.heads] if cls is ParallelMTP else [d["layer"] for d in method.depths]
    for name, weight in layers[0].named_parameters():
        assert weight.requires_grad and not torch.equal(weight, trunk_last[name])
        if weight.dim() > 1:
            assert 0.85 < float(weight.detach().std() / wanted[name].detach().std()) < 1.15
            assert not torch.equal(weight, dict(layers[1].named_parameters())[name])
        else:
            assert weight.unique().tolist() in ([0.0], [1.0])
    if cls is SequentialMTP:
        std = [float(d["projection"].weight.detach().std()) for d in method.depths]
        assert all(0.9 < s / model.config.initializer_range < 1.1 for s in std)
        assert all(torch.equal(d["hidden_norm"].weight, torch.ones(32)) for d in method.depths)


@pytest.mark.parametrize(
    ("method", "added", "millions"),
    [
        (ParallelMTP(ParallelMTPConfig(d_max=2)), 110_104_576, 110.1),
        (ParallelMTP(ParallelMTPConfig(d_max=4)), 3 * 110_104_576, 330.3),
        (SequentialMTP(SequentialMTPConfig(d_max=2)), 118_497_280, 118.5),
        (MuToR(MuToRConfig(d_max=4)), 2048, 0.0),
        (MuToR(MuToRConfig(d_max=4, register_embedding="per_offset")), 4 * 2048, 0.0),
        (NextToken(NextTokenConfig()), 0, 0.0),
    ],
)
def test_added_parameters_of_gemma_2b(method, added, millions):
    """Tables 4 and 16, on the meta device."""
    from transformers import GemmaConfig, GemmaForCausalLM

    with torch.device("meta"):
        model = GemmaForCausalLM(
            GemmaConfig(
                vocab_size=256000,
                hidden_size=2048,
                num_hidden_layers=18,
                num_attention_heads=8,
                num_key_value_heads=1,
                head_dim=256,
                intermediate_size=16384,
            )
        )
    before = sum(p.numel() for p in model.parameters())
    method.attach(model)
    assert method.added_parameters(model) == sum(p.numel() for p in model.parameters()) - before == added
    assert round(added / 1e6, 1) == millions
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize(("cls", "config"), ALL)
def test_means_inside_each_sequence_first(tiny, tools, cls, config):
    """per_sequence: the mean of what each sequence gives alone; without it, a mean over all tokens."""
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(3, 60, n), p, c) for c, (n, p) in enumerate([(12, 2), (6, 3), (9, 4)])]
    for row_length in (None, 20):
        model, method = tiny(), cls(config, per_sequence=True)
        tools.attach(method, model)
        together, _ = method.compute_loss(model, method.train_layout(collate(examples, 0, row_length), Context()))
        alone = [method.compute_loss(model, method.train_layout(collate([e], 0), Context()))[0] for e in examples]
        tools.close(together, torch.stack(alone).mean())
        method.per_sequence = False
        tokens, _ = method.compute_loss(model, method.train_layout(collate(examples, 0, row_length), Context()))
        assert abs(float(tokens.detach() - together.detach())) > 1e-4


@pytest.mark.parametrize(("cls", "config"), ALL)
def test_padding_plays_no_part(tiny, tools, batch, cls, config):
    """Other ids in the padding, the same loss."""
    model, method = tiny(), cls(config)
    tools.attach(method, model)
    layout = method.train_layout(batch.rows, Context(prefix_lm=True))
    other = replace(layout, ids=torch.where(layout.segment < 0, 33, layout.ids))
    tools.close(method.compute_loss(model, other)[0], method.compute_loss(model, layout)[0])
