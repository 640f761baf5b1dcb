"""Answers and scores through lm-evaluation-harness, which asks the training method for the answers.

outputs, scores = evaluate(model, method, tokenizer, "gsm8k", problems, right, new_tokens=512, batch_size=64,
                           prefix_lm=True)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from mutor.mtp.answers import Prompts
from mutor.mtp.method import Method
from mutor.tasks.formats import Problem
from mutor.tasks.task import Log


class MethodLM(HFLM):
    """HFLM whose answers a method gives, in batches; with `prefix_lm` prompts are read in both directions.

    log: called with a line of progress after each batch.
    """

    def __init__(
        self, model: Any, method: Method, tokenizer: Any, *, batch_size: int, prefix_lm: bool, log: Log | None = None
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
        self.method, self.prefix_lm, self.log = method, prefix_lm, log or (lambda line: None)
        self._done = self._total = 0

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As in HFLM; progress is said, not drawn."""
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        """The method's answers, up to the end token."""
        prompts = Prompts(
            context,
            kwargs["attention_mask"],
            max_length - context.shape[1],
            end_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            prefix_lm=self.prefix_lm,
        )
        answers = self.method.answer(self.model, prompts)
        self._done += len(context)
        self.log(f"{self._done}/{self._total} answers")
        return torch.cat([context, answers], dim=1)


def evaluate(
    model: Any,
    method: Method,
    tokenizer: Any,
    name: str,
    problems: Sequence[Problem],
    score: Callable[[str, str], dict[str, float]],
    *,
    new_tokens: int,
    batch_size: int,
    prefix_lm: bool,
    cache: Path | None = None,
    log: Log | None = None,
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The method's answers to all problems, and their scores.

    score: (output, gold) -> metrics of one problem, instead of lm-eval's own filters and metrics; cache: file that
    keeps answers as they come, so that a killed evaluation goes on where it was. Returns (outputs, metric -> float
    [N]), in the order of `problems`.
    """
    from datasets import Dataset
    from lm_eval.api.model import CachingLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as run_tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    documents = Dataset.from_list([{"number": i, "prompt": p.prompt, "gold": p.gold} for i, p in enumerate(problems)])
    metrics = sorted(score("", problems[0].gold))
    task: Any = ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": documents},
            "test_split": "test",
            "output_type": "generate_until",
            "num_fewshot": 0,
            "doc_to_text": lambda doc: doc["prompt"],
            "doc_to_target": lambda doc: doc["gold"],
            "process_results": lambda doc, outputs: score(outputs[0], doc["gold"]),
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
            "generation_kwargs": {"until": [], "max_gen_toks": new_tokens, "do_sample": False},
        }
    )
    lm: Any = MethodLM(model, method, tokenizer, batch_size=batch_size, prefix_lm=prefix_lm, log=log)
    if cache:
        lm = CachingLM(lm, f"{cache}.db")
    # not simple_evaluate, which seeds all generators and asks pip and git about the machine, for seconds each time
    done = run_tasks(lm, {"tasks": {name: task}, "groups": {}}, bootstrap_iters=0)
    assert done is not None
    samples = sorted(done["samples"][name], key=lambda s: s["doc"]["number"])
    scores = {m: np.array([float(s[m]) for s in samples]) for m in metrics}
    return [s["filtered_resps"][0] for s in samples], scores
