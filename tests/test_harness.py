"""Answers by lm-evaluation-harness: in batches, of models and of methods, after a kill."""

import numpy as np
import pytest
import torch
from mutor.baselines.next_token import NextToken

from mutor.tasks.formats import Problem


@pytest.fixture(scope="session")
def words():
    """A tokenizer of the words <0> .. <60>; 0 pads, 1 begins, 2 ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(61)}, unk_token="<3>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<1> $A", special_tokens=[("<1>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<0>", bos_token="<1>", eos_token="<2>")


@pytest.mark.parametrize("prefix_lm", [True, False])
def test_batched_answers_equal_one_by_one_without_cache(tiny, tools, family, words, prefix_lm):
    """Prompts of different lengths in one left-padded batch against a loop of whole forwards, one prompt at a time."""
    from mutor.tasks.harness import evaluate

    model = tiny(family, scale=3.0)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 61, n).tolist() for n in (9, 3, 6, 1, 7)]
    found = [Problem(" ".join(f"<{i}>" for i in p), "", "<5>") for p in prompts]

    def score(output, gold):
        return {"right": float(gold in output.split())}

    settings = {"new_tokens": 8, "batch_size": 3, "prefix_lm": prefix_lm}
    outputs, scores = evaluate(model, NextToken(None), words, "words", found, score, **settings)
    for prompt, output, right in zip(prompts, outputs, scores["right"], strict=True):
        ids = [1, *prompt]
        for _ in range(8):
            best = int(tools.plain_logits(model, ids, 1 + len(prompt), prefix_lm)[-1].argmax())
            ids.append(best)
            if best == 2:
                break
        wanted = [i for i in ids[1 + len(prompt) :] if i > 2]
        assert [int(w[1:-1]) for w in output.split()] == wanted
        assert right == float(5 in wanted)


@pytest.mark.parametrize("prefix_lm", [True, False])
def test_answers_that_end_leave_the_batch_and_the_others_do_not_notice(tiny, family, prefix_lm):
    """A token that one of four prompts leads to serves as the end token, so that others end elsewhere or never."""
    from mutor.mtp.answers import Prompts, decode

    def answers(end):
        return decode(model, Prompts(ids, attended, 12, end_id=end, prefix_lm=prefix_lm))

    model, rng = tiny(family), np.random.default_rng(1)
    many = [0, 1, 2, 3] + [1, 2, 3] * 6  # the first is too few to leave the batch when it has ended
    attended = (torch.arange(9) >= torch.tensor([[0], [3], [5], [8]])).long()[many]
    ids = torch.tensor(rng.integers(3, 61, (4, 9)))[many] * attended
    whole = answers(-1)
    sizes, forward = [], model.forward
    model.forward = lambda **given: (sizes.append(len(given["input_ids"])), forward(**given))[1]
    for end in whole[:4, 2].tolist():
        wanted = whole.clone()
        for row in wanted:
            row[1 + (row == end).nonzero()[0, 0] if end in row else 12 :] = 0
        assert torch.equal(answers(end), wanted)
    assert min(sizes) <= 15


def test_the_method_is_asked_for_the_answers(tiny, words):
    """One that answers with the last token of the prompt, then the end."""
    from mutor.tasks.harness import evaluate

    class Last(NextToken):
        def answer(self, model, prompts):
            assert (prompts.length, prompts.end_id, prompts.pad_id, prompts.prefix_lm) == (4, 2, 0, True)
            assert prompts.attended.tolist() == [[1, 1, 1], [0, 1, 1]]
            return torch.nn.functional.pad(prompts.ids[:, -1:], (0, 1), value=2)

    found = [Problem("<9> <5>", "", "<5>"), Problem("<8>", "", "<5>")]
    settings = {"new_tokens": 4, "batch_size": 2, "prefix_lm": True}
    model = tiny("llama")
    outputs, _ = evaluate(model, Last(None), words, "words", found, lambda out, gold: {"right": 0.0}, **settings)
    assert outputs == ["<5>", "<8>"]


def test_killed_evaluation_goes_on_where_it_was(tiny, words, tmp_path):
    from mutor.tasks.harness import evaluate

    model = tiny("llama")
    found = [Problem(f"<{i}> <{i + 1}>", "", "<5>") for i in range(3, 15)]

    def answers(**more):
        settings = {"new_tokens": 4, "batch_size": 3, "prefix_lm": True, **more}
        return evaluate(model, NextToken(None), words, "words", found, lambda out, gold: {"right": 0.0}, **settings)[0]

    whole, seen = answers(), []

    def stop(line):
        seen.append(line)
        if line == "6/12 answers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers(cache=tmp_path / "answers", log=stop)
    again: list[str] = []
    assert answers(cache=tmp_path / "answers", log=again.append) == whole
    assert again == ["3/9 answers", "6/9 answers", "9/9 answers"]  # the first batch was kept
