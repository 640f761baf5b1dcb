"""Decoding with drafts against decoding without, token by token, and against what one pass over the text predicts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from mutor.baselines.joint_mtp import JointMTP, JointMTPConfig
from mutor.baselines.next_latent import NextLatent, NextLatentConfig
from mutor.baselines.next_token import NextToken, NextTokenConfig
from mutor.baselines.parallel_mtp import ParallelMTP, ParallelMTPConfig
from mutor.baselines.sequential_mtp import SequentialMTP, SequentialMTPConfig
from mutor.baselines.teacherless import Teacherless, TeacherlessConfig
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from mutor.decode import PromptLookup, generate, load, speculative
from mutor.mtp.drafts import Drafter
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR

RNG = np.random.default_rng(0)
PROMPTS = [torch.tensor(RNG.integers(3, 61, int(length))) for length in RNG.integers(1, 16, 200)]
NEW = 10
METHODS = {
    "mutor": lambda: MuToR.of(d_max=4, register_embedding="per_offset"),
    "gated": lambda: MuToR.of(d_max=4, trunk="frozen", register_lora=2),
    "heads": lambda: ParallelMTP(ParallelMTPConfig(d_max=4)),
    "own output": lambda: ParallelMTP(ParallelMTPConfig(d_max=4, head="output")),
    "weighted": lambda: ParallelMTP(ParallelMTPConfig(d_max=4, hidden="uniform", injection=0.5)),
    "modules": lambda: SequentialMTP(SequentialMTPConfig(d_max=4)),
    "loud modules": lambda: SequentialMTP(SequentialMTPConfig(d_max=4)),
    "latent": lambda: NextLatent(NextLatentConfig(horizon=3)),
    "joint": lambda: JointMTP(JointMTPConfig(horizon=4)),
    "lookup": PromptLookup,
}
BOTH = pytest.mark.parametrize("prefix_lm", [False, True])
FURTHER = ["gemma", "qwen3"]  # families that `make test-long` decodes with every method


class Scripted:
    """Drafts of a known continuation, of which as many are right as a script says, pass by pass."""

    def __init__(self, truth, right):
        self.truth, self.right = truth, right

    def drafter(self, draft):
        def propose(step):
            rows = [truth[int(last) + 2 :][:draft].clone() for truth, last in zip(self.truth, step.last, strict=True)]
            for row, right in zip(rows, next(self.passes), strict=True):
                row[right:] = (row[right:] + 1) % 61
            step.put(torch.stack(rows))

        self.passes = iter(self.right)
        return Drafter(propose)


def made(tools, tiny, name, family="llama", **own):
    """(model, method), attached."""
    model, method = tiny(family, **own), METHODS[name]()
    if name != "lookup":
        tools.attach(method, model)
    if name == "modules":  # what the token says in a whisper: some drafts are right, where random ones never are
        with torch.no_grad():
            for depth in method.depths:
                eye = torch.eye(32)
                depth["projection"].weight.copy_(torch.cat([eye, 0.3 * eye], 1))
                for parameter in depth["layer"].parameters():
                    parameter.mul_(0.3)
    return model, method


def greedy(tools, model, prompt, new=NEW, prefix_lm=False):
    """Token by token, without a cache."""
    ids = prompt.tolist()
    for _ in range(new):
        ids.append(int(tools.plain_logits(model, ids, len(prompt), prefix_lm)[-1].argmax()))
    return ids[len(prompt) :]


def texts(done):
    return [ids.tolist() for ids in done.ids]


@pytest.fixture(scope="module")
def stock(tiny):
    """family -> the 200 continuations that `generate` of transformers gives, left-padded."""
    known = {}

    def continuations(family):
        if family not in known:
            ids = torch.nn.utils.rnn.pad_sequence([p.flip(0) for p in PROMPTS], batch_first=True).flip(1)
            mask = torch.nn.utils.rnn.pad_sequence([p.flip(0) * 0 + 1 for p in PROMPTS], batch_first=True).flip(1)
            model = tiny(family)
            given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            known[family] = model.generate(ids, attention_mask=mask, **given)[:, ids.shape[1] :].tolist()
        return known[family]

    return continuations


@pytest.mark.parametrize(
    ("name", "family"),
    [
        pytest.param(name, family, marks=[pytest.mark.long] * (family in FURTHER and name not in ("heads", "mutor")))
        for name, family in itertools.product(METHODS, ["gpt2", "llama", *FURTHER])
        if name != "own output"  # at random no draft is right
    ],
)
def test_texts_are_those_of_greedy_decoding(tools, tiny, stock, name, family):
    """200 prompts of different lengths in one batch, whose rows accept different numbers."""
    model, method = made(tools, tiny, name, family)
    for k in (1, 3):
        done = generate(model, method, PROMPTS, new_tokens=NEW, draft=k)
        assert texts(done) == stock(family)
        kept = [count for row in done.accepted for count in row]
        assert min(kept) == 0 and max(kept) <= k and (sum(kept) or name == "loud modules")
        assert all(len(ids) == 1 + sum(1 + count for count in row) for ids, row in zip(*vars_of(done), strict=True))


def vars_of(done):
    return done.ids, done.accepted


@pytest.mark.parametrize("name", ["heads", "mutor"])
def test_many_families(tools, tiny, family, name):
    """One prompt at a time, also under softcapped, scaled and windowed models."""
    model, method = made(tools, tiny, name, family)
    for prompt in PROMPTS[:3]:
        done = generate(model, method, [prompt], new_tokens=NEW, draft=2)
        assert texts(done) == [greedy(tools, model, prompt)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["mutor", "modules"])
def test_under_each_attention(tools, tiny, name, attention):
    model, method = made(tools, tiny, name, attn_implementation=attention)
    done = generate(model, method, PROMPTS[:4], new_tokens=NEW, draft=3)
    assert texts(done) == [greedy(tools, model, prompt) for prompt in PROMPTS[:4]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "name", ["mutor", "heads", "own output", "weighted", "modules", "loud modules", "latent", "joint"]
)
@BOTH
def test_drafts_are_those_of_one_pass_over_the_text(tools, tiny, name, family, prefix_lm):
    """Those of `Method.ahead`, from the tokens up to t alone: each draft of each pass, and how many are kept.

    Jumping from t to t + 1 + kept gives every pass of the loop.
    """
    model, method = made(tools, tiny, name, family)
    prompts, some, drafter, log = [p for p in PROMPTS if len(p) > 2][:5], 0, method.drafter, {}

    def logged(draft):
        inner = drafter(draft)

        def propose(step):
            inner.propose(step)
            log[int(step.last)] = step.text[0, int(step.last) + 2 :][:3].tolist()

        return replace(inner, propose=propose)

    for prompt in prompts:
        log.clear()
        method.drafter = logged
        done = generate(model, method, [prompt], new_tokens=24, draft=3, prefix_lm=prefix_lm)
        method.drafter = drafter
        (new,), (accepted,), ids = done.ids, done.accepted, torch.cat([prompt, done.ids[0]])
        assert prompt is not prompts[0] or new.tolist() == greedy(tools, model, prompt, 24, prefix_lm)
        layout = method.eval_layout(collate([Example(ids.numpy(), len(prompt))], 0), Context(prefix_lm=prefix_lm))
        drafts = {}
        with torch.no_grad():
            for found in method.ahead(model, layout):
                likeliest = zip(found.index.tolist(), found.logits.argmax(-1).tolist(), strict=True)
                drafts |= {(t, found.distance): token for t, token in likeliest}
        t, predicted = len(prompt) - 1, []
        while t + 2 < len(ids):
            assert log[t][: len(ids) - t - 2] == [drafts[t, k] for k in (2, 3, 4) if t + k < len(ids)]
            room = len(ids) - t - 3  # the last token of a text counts as what comes free
            right = [k < room + 2 and drafts[t, k] == ids[t + k] for k in (2, 3, 4)]
            predicted.append(min([*(n for n, each in enumerate(right) if not each), 3]))
            t += 1 + predicted[-1]
        assert predicted == accepted
        some += sum(accepted)
    assert some or name in ("own output", "loud modules", "joint")


def test_positions_after_a_rejection(tools, tiny):
    """What each pass is fed, by hand: the token that the pass before found, and drafts, at positions that follow on."""
    model, fed = tiny("gpt2"), []
    prompts = [PROMPTS[1][:4], PROMPTS[2][:2]]
    truth = [torch.tensor([*p.tolist(), *greedy(tools, model, p, 14)]) for p in prompts]
    method, forward = Scripted(truth, [(2, 0), (1, 2), (0, 0), (2, 2), (0, 0), (0, 0)]), model.forward
    generate(model, None, [prompts[0]], new_tokens=1)  # what is tried beforehand is not counted
    model.forward = lambda **given: (fed.append(given), forward(**given))[1]
    done = generate(model, method, prompts, new_tokens=8, draft=2)
    del model.forward
    assert texts(done) == [text[len(p) :][:8].tolist() for text, p in zip(truth, prompts, strict=True)]
    assert done.accepted == [[2, 1, 0, 0], [0, 2, 0, 1]]  # the end cuts off what was right
    assert [given["position_ids"].tolist() for given in fed] == [
        [[0, 1, 2, 3], [0, 1, 2, 3]],  # the second prompt is padded behind its end
        [[4, 5, 6], [2, 3, 4]],
        [[7, 8, 9], [3, 4, 5]],  # three tokens were found, and one
        [[9, 10, 11], [6, 7, 8]],
        [[10, 11, 12], [7, 8, 9]],
    ]
    for given, row in [(fed[2], 0), (fed[2], 1), (fed[4], 0)]:
        place = int(given["position_ids"][row, 0])
        assert given["input_ids"][row, 0] == truth[row][place]
    seen = fed[3]["attention_mask"][0, 0].int().tolist()
    assert [sum(line) for line in seen] == [10, 11, 12]  # each its own place and all before it, and nothing behind


@pytest.mark.parametrize("name", ["heads", "modules", "mutor", "lookup"])
def test_sampling_has_the_distribution_of_the_model(tools, tiny, name):
    """Chi-square of the second and the third token, 4,000 texts, against their exact probabilities."""
    model, method = made(tools, tiny, name, vocab_size=7, scale=14.0, eos_token_id=2)
    prompt, count = torch.tensor([3, 5, 4, 3, 5]), 4000
    done = generate(model, method, [prompt] * count, new_tokens=4, draft=2, temperature=1.3, seed=4)
    kept = [row[0] for row in done.accepted]
    assert min(kept) == 0 and max(kept) == 2

    @torch.no_grad()
    def likely(ids):
        return (tools.plain_logits(model, ids, len(prompt), False)[-1] / 1.3).softmax(-1).double()

    first = likely(prompt.tolist())
    pairs = torch.stack([first[a] * likely([*prompt.tolist(), a]) for a in range(7)])
    third = torch.stack([torch.stack([likely([*prompt.tolist(), a, b]) for b in range(7)]) for a in range(7)])
    exact = {(1,): pairs.flatten(), (1, 2): (pairs[..., None] * third).sum(0).flatten()}
    tokens = torch.stack(done.ids)
    observed = {(1,): 7 * tokens[:, 0] + tokens[:, 1], (1, 2): 7 * tokens[:, 1] + tokens[:, 2]}
    for which, wanted in exact.items():
        found = torch.bincount(observed[which], minlength=49).double()
        large = count * wanted >= 5
        found, wanted = (torch.cat([x[large], x[~large].sum()[None]]) for x in (found, count * wanted))
        statistic = float(((found - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
        freedom = len(found) - 1
        assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5, (name, which, statistic, freedom)


def test_drafts_of_the_models_own_distribution_are_all_kept(tools, tiny):
    """p(x) / q(x) is 1: what is drawn is judged by what it was drawn from, at each place."""
    model = tiny()

    class Same:
        def drafter(self, draft):
            def propose(step):
                for n in range(draft):
                    rows = [
                        (text[: int(last) + 2 + n]).tolist() for text, last in zip(step.text, step.last, strict=True)
                    ]
                    step.choose(torch.stack([tools.plain_logits(model, ids, 1, False)[-1] for ids in rows]))

            return Drafter(propose)

    done = generate(model, Same(), PROMPTS[:8], new_tokens=NEW, draft=2, temperature=2.0)
    assert {count for row in done.accepted for count in row[:-1]} == {2}
    again = generate(model, Same(), PROMPTS[:8], new_tokens=NEW, draft=2, temperature=2.0, seed=1)
    assert texts(done) != texts(again)
    for draft in (0, 2):  # whatever torch's own generator has drawn meanwhile
        twice = [generate(model, Same(), PROMPTS[:8], new_tokens=NEW, draft=draft, temperature=2.0) for _ in range(2)]
        assert texts(twice[0]) == texts(twice[1])


def test_an_end_token_ends_a_text_wherever_it_stands(tools, tiny, stock):
    """Also in the middle of what a pass accepts; other rows go on."""
    model, method = made(tools, tiny, "heads")
    end = stock("llama")[0][4]
    done = generate(model, method, PROMPTS[:40], new_tokens=NEW, draft=3, end_id=end)
    cut = [row[: row.index(end) + 1] if end in row else row for row in stock("llama")[:40]]
    assert texts(done) == cut
    assert len({len(row) for row in cut}) > 1


def test_drafts_run_on_to_the_last_position(tools, tiny):
    """A text may fill the model's positions; drafts beyond them change nothing."""
    for family, name in [("gpt2", "mutor"), ("gpt2", "modules"), ("llama", "heads")]:
        model, method = made(tools, tiny, name, family)
        prompt = torch.tensor(RNG.integers(3, 61, 58))
        done = generate(model, method, [prompt], new_tokens=6, draft=3)
        assert texts(done) == [greedy(tools, model, prompt, 6)]
        with pytest.raises(ValueError, match="max_position_embeddings: 64, and prompt and new tokens are 65"):
            generate(model, method, [prompt], new_tokens=7, draft=3)


@pytest.mark.parametrize("name", ["heads", "mutor", "lookup"])
def test_through_transformers(tools, tiny, name):
    """`generate(custom_generate=)` with padding, logits processors, a stopping criterion and end tokens."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AfterSeven(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 7 == 0

    model, method = made(tools, tiny, name)
    ids = torch.tensor([[0, 0, 9, 8, 7], [9, 8, 7, 9, 8]])
    given = {"attention_mask": (ids > 0).long(), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    penalty = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1, "attention_mask": None}  # goes without padding
    with pytest.raises(ValueError, match="logits_processor: RepetitionPenaltyLogitsProcessor with padded prompts"):
        model.generate(ids, **given | {"repetition_penalty": 1.3}, custom_generate=speculative(method, draft=2))
    stopping = {"stopping_criteria": StoppingCriteriaList([AfterSeven()])}
    for more in ({}, penalty, stopping, {"eos_token_id": [5, 6]}):
        more, ids = given | more, ids if more is not penalty else ids.clamp(min=3)
        wanted = model.generate(ids, **more)
        found = model.generate(ids, **more, custom_generate=speculative(method, draft=2))
        if "stopping_criteria" in more:  # transformers goes on until all rows have stopped
            wanted = [
                row[: next((n + 1 for n in range(5, 17) if n < len(row) and row[n] % 7 == 0), 17)] for row in wanted
            ]
            assert all(
                torch.equal(a, b[: len(a)]) and not b[len(a) :].any() for a, b in zip(wanted, found, strict=True)
            )
        else:
            assert torch.equal(found, wanted)
    torch.manual_seed(0)
    drawn = [model.generate(ids[1:], max_new_tokens=9, do_sample=True, custom_generate=speculative(method, 2))]
    torch.manual_seed(0)
    drawn += [model.generate(ids[1:], max_new_tokens=9, do_sample=True, custom_generate=speculative(method, 2))]
    assert torch.equal(*drawn)


def test_what_can_not_be_decoded_is_refused(tools, tiny):
    model, method = made(tools, tiny, "mutor")
    refused = [
        ("draft: 4 tokens behind the next, and MuToR has d_min 1, d_max 4, leap 1; allowed: 0 to 3", {"draft": 4}),
        ("draft: -1 is out of range, allowed: 0 or more", {"draft": -1}),
        ("new_tokens: 0 is out of range", {"new_tokens": 0}),
        ("temperature: -1", {"temperature": -1}),
        ("temperature: nan", {"temperature": float("nan")}),
        ("prompts: there is none, or an empty one", {"prompts": []}),
        ("prompts: there is none, or an empty one", {"prompts": [[3], []]}),
        ("prompts: 61 is no token of this model; allowed: 0 to 60", {"prompts": [[3], [5, 61, 7]]}),
        ("draft: 1, and there is no method to draft", {"method": None}),
        ("MuToR: is not attached to this model", {"method": MuToR.of()}),
        ("MuToR: is not attached to this model", {"model": tiny()}),
    ]
    for words, change in refused:
        given = {"model": model, "method": method, "prompts": [[3, 4]], "new_tokens": 4, "draft": 1} | change
        with pytest.raises(ValueError, match=words):
            generate(**given)
    for other, words in [
        (NextToken(NextTokenConfig()), "draft: 1, and NextToken predicts the next token alone; allowed: 0"),
        (MuToR.of(d_min=3), "d_min 3, d_max 4, leap 1; allowed: 0"),
        (SequentialMTP(SequentialMTPConfig(d_max=3, leap=2)), "SequentialMTP has 1 modules and leap 2; allowed: 0"),
        (NextLatent(NextLatentConfig()), "horizon 1"),
        (Teacherless(TeacherlessConfig()), "Teacherless: the plain model does not answer alone"),
    ]:
        plain = tools.attach(other, tiny())
        with pytest.raises(ValueError, match=words):
            generate(plain, other, [[3, 4]], new_tokens=4, draft=1 if "horizon" not in words else 2)
    with pytest.raises(ValueError, match="ngram: 0"):
        PromptLookup(0)
    with pytest.raises(ValueError, match="sliding_window: 8, and prompt and new tokens are 12"):
        generate(tiny("mistral", sliding_window=8), None, [[3] * 8], new_tokens=4)
    with pytest.raises(ValueError, match=r"can't be decoded with a cache in which each row has a place of its own"):
        generate(tiny("mamba"), None, [[3, 4]], new_tokens=4)


def test_caches_that_transformers_was_given_are_refused(tools, tiny):
    model, method = made(tools, tiny, "mutor")
    filled = DynamicCache()
    model(input_ids=torch.tensor([[3, 4]]), past_key_values=filled)
    sliding = DynamicCache(config=tiny("mistral", sliding_window=8).config)
    for words, given in [
        ("cache_implementation: 'static'", {"cache_implementation": "static"}),
        ("StaticCache is static", {"past_key_values": StaticCache(model.config, max_cache_len=20)}),
        ("holds 2 tokens", {"past_key_values": filled}),
        ("has a sliding window", {"past_key_values": sliding}),
        ("num_beams: 2", {"num_beams": 2}),
        ("return_dict_in_generate: True", {"return_dict_in_generate": True}),
    ]:
        with pytest.raises(ValueError, match=words):
            model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, custom_generate=speculative(method, 1), **given)


def test_a_checkpoint_with_its_weights_beside_it(tools, tiny, tmp_path):
    """`export` saves them there, and `load` puts them in place; the plain model stays what anyone loads."""
    model, method = made(tools, tiny, "mutor")
    method.export(model, tmp_path / "whole")
    again, loaded = load(tmp_path / "whole")
    assert loaded.config == method.config
    done = [generate(m, by, PROMPTS[:20], new_tokens=NEW, draft=3) for m, by in [(model, method), (again, loaded)]]
    assert texts(done[0]) == texts(done[1]) and done[0].accepted == done[1].accepted
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), "mtp")
    (tmp_path / "whole/method/weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"method/weights.safetensors: is missing"):
        load(tmp_path / "whole")
    tiny().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"method/method.json: is missing"):
        load(tmp_path / "plain")
    method.export(model, tmp_path / "other")
    made_by = tmp_path / "other/method/method.json"
    made_by.write_text(made_by.read_text().replace("mutor.mtp.mutor:MuToR", "antigravity:MuToR"))
    with pytest.raises(ValueError, match="class 'antigravity:MuToR' is none of the suite's methods"):
        load(tmp_path / "other")
