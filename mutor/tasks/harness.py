"""Answers and scores through lm-evaluation-harness, with prefixes read in both directions.

outputs, scores = evaluate(model, tokenizer, "gsm8k", problems, right, new_tokens=512, batch_size=64, prefix_lm=True)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM

from mutor.tasks.corpora import Problem


class PrefixLM(HFLM):
    """HFLM that decodes greedily in batches and, with `prefix_lm`, reads prompts in both directions.

    say: called with a line of progress after each batch.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, prefix_lm: bool, say: Callable[[str], None] | None = None
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
        self.prefix_lm, self.say = prefix_lm, say or (lambda line: None)
        self._done = self._total = 0

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As in HFLM; progress is said, not drawn."""
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        """Greedy decoding up to the end token; the prefill sees the whole prompt with `is_causal=False`."""
        out = self.model.generate(
            context,
            attention_mask=kwargs["attention_mask"],
            max_length=max_length,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            **({"is_causal": False} if self.prefix_lm else {}),
        )
        self._done += len(context)
        self.say(f"{self._done}/{self._total} answers")
        return out


def evaluate(
    model: Any,
    tokenizer: Any,
    name: str,
    problems: Sequence[Problem],
    score: Callable[[str, str], dict[str, float]],
    *,
    new_tokens: int,
    batch_size: int,
    prefix_lm: bool,
    cache: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Greedy answers to all problems, and their scores.

    score: (output, gold) -> metrics of one problem; cache: file that keeps answers as they come, so that a killed
    evaluation goes on where it was. Returns (outputs, metric -> float [N]), in the order of `problems`.
    """
    from datasets import Dataset
    from lm_eval.api.model import CachingLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    documents = Dataset.from_list([{"number": i, "prompt": p.prompt, "gold": p.gold} for i, p in enumerate(problems)])
    metrics = sorted(score("", problems[0].gold))
    task: Any = ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": documents},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": lambda doc: doc["prompt"],
            "doc_to_target": lambda doc: doc["gold"],
            "process_results": lambda doc, outputs: score(outputs[0], doc["gold"]),
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
            "num_fewshot": 0,
            "generation_kwargs": {"until": [], "max_gen_toks": new_tokens, "do_sample": False},
        }
    )
    answering: Any = PrefixLM(model, tokenizer, batch_size=batch_size, prefix_lm=prefix_lm, say=say)
    if cache:
        answering = CachingLM(answering, f"{cache}_rank0.db")
    # not simple_evaluate: it sets seeds, looks at the machine, and keeps results from all processes but one
    done = lm_evaluate(answering, TaskManager(include_defaults=False).load([task]), bootstrap_iters=0)
    assert done is not None
    samples = sorted(done["samples"][name], key=lambda s: s["doc"]["number"])
    scores = {m: np.array([float(s[m]) for s in samples]) for m in metrics}
    return [s["filtered_resps"][0] for s in samples], scores
