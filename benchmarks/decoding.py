"""Greedy decoding on the suite's texts, as ratios in one process.

    python benchmarks/decoding.py [--model FOLDER] [--problems 200] [--alone 20] [--batch 100] [--rounds 5]

batched: answers through the suite's evaluation against one problem at a time, by a plain loop of forwards with the KV
cache, without lm-evaluation-harness and `generate`, over the same problems or, as it is slow, some of them. Outputs
have to be the same.
plain: the loop of mutor.decode without drafts against transformers' `generate`, at batch 1. Tokens have to be the same.
drafts: where FOLDER has a method's weights beside the plain ones, the speed-up by its drafts at batch 1, beside what
FLOPs and passes alone would give.

What is compared takes turns, after a warm-up; medians of the rounds count. A new model never ends an answer, so all
have full length; one trained on stand-ins (FOLDER, for example runs/.../last) ends each where it ends.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from mutor.baselines.next_token import NextToken
from training_loop import ratios

from mutor.config.schema import ModelConfig
from mutor.decode import generate, load
from mutor.models.build import build
from mutor.tasks.harness import evaluate
from mutor.tasks.text import Text, TextConfig
from mutor.training.decoding import measure

LAPTOP = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
NEW = ModelConfig(role="gemma-2b", architecture="gemma", config=LAPTOP, init="fan_in")


def batched(model, task, found, batch_size):
    """Answers as the suite's evaluation gives them."""
    return evaluate(
        model,
        NextToken(None),
        task.tokenizer,
        "gsm8k",
        found,
        task.score,
        new_tokens=task.config.new_tokens,
        batch_size=batch_size,
        prefix_lm=task.prefix_lm,
    )[0]


@torch.no_grad()
def alone(model, task, problem):
    """The answer to one problem, a forward a token."""
    ids, found, cache = torch.tensor([task.tokenizer(problem.prompt)["input_ids"]]), [], None
    both = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool) if task.prefix_lm else None
    out = model(input_ids=ids, attention_mask=both, use_cache=True)
    while len(found) < task.config.new_tokens:
        best, cache = int(out.logits[0, -1].argmax()), out.past_key_values
        if best == task.tokenizer.eos_token_id:
            break
        found.append(best)
        out = model(input_ids=torch.tensor([[best]]), past_key_values=cache, use_cache=True)
    return task.tokenizer.decode(found, skip_special_tokens=True)


def timed(answer, *given):
    """(what it answers, seconds on the processor: with one thread those of the clock, if nothing else runs)."""
    began = time.process_time()
    out = answer(*given)
    return out, time.process_time() - began


def together_and_alone(args, task, model):
    """Problems a second through the evaluation, and one at a time."""
    found = task.problems["test"]
    step = max(1, args.problems // args.alone)
    some = found[::step]
    batched(model, task, found[: args.batch], args.batch), alone(model, task, some[0])
    pairs = []
    for _ in range(args.rounds):
        together, seconds = timed(batched, model, task, found, args.batch)
        single, seconds_alone = timed(lambda: [alone(model, task, problem) for problem in some])
        assert single == together[::step], "batched answers differ from those one at a time"
        pairs.append((len(found) / seconds, len(some) / seconds_alone))
    return {
        "answers_compared": len(some) * args.rounds,
        "tokens_per_answer": round(statistics.mean(len(task.tokenizer(x)["input_ids"]) - 1 for x in together), 1),
        "batched_problems_per_s": round(statistics.median(a for a, _ in pairs), 2),
        "alone_problems_per_s": round(statistics.median(b for _, b in pairs), 2),
        **ratios(pairs),
    }


def plain(args, task, model, prompts):
    """Seconds of the loop without drafts over those of transformers' `generate`, on the same prompts."""
    end, new = task.tokenizer.eos_token_id, args.new_tokens

    def ours(ids):
        return generate(model, None, [ids], new_tokens=new, end_id=end).ids[0].tolist()

    @torch.no_grad()
    def theirs(ids):
        fed = torch.tensor(ids)[None]
        options = {"max_new_tokens": new, "eos_token_id": end, "pad_token_id": end, "do_sample": False}
        return model.generate(fed, attention_mask=torch.ones_like(fed), **options)[0, len(ids) :].tolist()

    ours(prompts[0]), theirs(prompts[0])
    pairs = []
    for _ in range(args.rounds):
        seconds = [0.0, 0.0]
        for ids in prompts:
            (a, first), (b, second) = timed(ours, ids), timed(theirs, ids)
            assert a == b, "the text differs from that of transformers"
            seconds = [seconds[0] + first, seconds[1] + second]
        pairs.append(tuple(seconds))
    return {"texts": len(prompts), **ratios(pairs)}


def drafted(args, task, prompts):
    """Of each number of drafts the speed-up, and what FLOPs and passes alone would give; medians of the rounds."""
    model, method = load(args.model)
    options = {"new_tokens": args.new_tokens, "end_id": task.tokenizer.eos_token_id, "prefix_lm": task.prefix_lm}
    rounds = [measure(model, method, prompts, **options, log=print) for _ in range(args.rounds)]
    found = {"method": type(method).__name__, "texts": len(prompts)}
    for name in rounds[0]:
        if name.startswith("speedup_"):
            k = name.rpartition("_")[2]
            by_flops = rounds[0]["flops_per_token_draft_0"] / rounds[0][f"flops_per_token_draft_{k}"]
            speedup = statistics.median(measured[name] for measured in rounds)
            found[k] = {
                "speedup": round(speedup, 3),
                "speedup_min": round(min(measured[name] for measured in rounds), 3),
                "speedup_max": round(max(measured[name] for measured in rounds), 3),
                "by_flops": round(by_flops, 3),
                "by_passes": round(rounds[0][f"acceptance_length_draft_{k}"], 3),
                "same_texts_percent": rounds[0][f"identical_draft_{k}"],
            }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a trained model; without it a new one of 4 layers x 128")
    parser.add_argument("--problems", type=int, default=200, help="0: batched is left out")
    parser.add_argument("--alone", type=int, default=20, help="so many of them, evenly spread, one at a time")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = {"test_size": args.problems or args.alone, "new_tokens": args.new_tokens}
    task = Text(TextConfig(corpus="gsm8k", source="generated", tokens="standin", **options))
    config = ModelConfig(role=NEW.role, pretrained=args.model) if args.model else NEW
    model = build(config, vocabulary=task.vocabulary, seed=0).eval()
    prompts = [ids[:prefix].tolist() for ids, prefix in task.examples("test")[: args.alone]]
    result = {
        "model": args.model or "gemma, 4 layers x 128, new: answers of full length",
        "batched": together_and_alone(args, task, model) if args.problems else None,
        "plain": plain(args, task, model, prompts),
        "drafts": drafted(args, task, prompts) if args.model and (Path(args.model) / "method").exists() else None,
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
