"""Prompts and answers in text: mathematical reasoning, multiple choice, summaries, or a user's own.

task = Text(TextConfig(corpus="gsm8k", source="generated", tokens="standin"))
task.evaluate(model, method, Context(pad_id=task.pad_id, prefix_lm=task.prefix_lm), "test", batch_size=64)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mutor.checks import setting
from mutor.files import write_text
from mutor.tasks.corpora import CORPORA, Origin, problems
from mutor.tasks.formats import Problem
from mutor.tasks.own_data import as_prompts, check_answers, check_apart, with_gold
from mutor.tasks.scoring import COMPARE, EXTRACT, rouge
from mutor.tasks.task import Log, Source, Task

if TYPE_CHECKING:
    from mutor.mtp.method import Context, Method


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The corpus, where it comes from, how much of it, and how answers are scored."""

    corpus: str = setting(
        doc="a published corpus, `mix` to train base models on, `python` (source files), or `own`",
        choices=tuple(CORPORA),
    )
    source: str = setting(
        "hub",
        doc="where its rows come from; installed, with corpus python: the standard library's own files",
        choices=("hub", "folder", "generated", "installed"),
    )
    folder: str | None = setting(
        None, doc="with source folder: the folder that holds one folder a dataset", on_disk="folder"
    )
    train_file: str | None = setting(
        None, doc="with corpus own: JSONL of prompt and answer, or messages", on_disk="mutor.tasks.own_data:check_file"
    )
    valid_file: str | None = setting(
        None,
        doc="with corpus own: to choose checkpoints; none: the last is the best",
        on_disk="mutor.tasks.own_data:check_file",
    )
    test_file: str | None = setting(
        None,
        doc="with corpus own: to score; gold: what is right, if not what extract finds in the answer",
        on_disk="mutor.tasks.own_data:check_file",
    )
    extract: str | None = setting(None, doc="how an answer is found in a text", choices=(*EXTRACT, None))
    compare: str | None = setting(None, doc="what is right", choices=(*COMPARE, "rouge", None))
    train_size: int | None = setting(None, doc="first so many training examples", low=1)
    valid_size: int | None = setting(None, doc="first so many problems scored during training", low=1)
    test_size: int | None = setting(None, doc="first so many problems scored at the end", low=1)
    max_tokens: int | None = setting(
        None, doc="longer training examples are dropped; losses of right answers stop there", low=8
    )
    new_tokens: int | None = setting(
        None, doc="longest answer; a prompt that leaves no room for it in the model's positions counts as wrong", low=1
    )
    prefix_lm: bool = setting(True, doc="prompts are read in both directions, in training and at inference")
    calculator: bool = setting(True, doc="keep GSM8K's calculator marks <<48/2=24>> in training answers")
    expect: str | None = setting(None, doc="data_hash of an earlier run; other data are refused")
    tokens: str = setting(
        "model",
        doc="the model's tokenizer, the stand-ins' own, or one token a byte",
        choices=("model", "standin", "bytes"),
    )

    def __post_init__(self) -> None:
        if self.corpus == "own":
            for name in ("train_file", "test_file"):
                if not getattr(self, name):
                    raise ValueError(f"{name}: missing, corpus 'own' needs a JSONL file of prompt and answer")
        elif self.train_file or self.valid_file or self.test_file:
            raise ValueError(f"train_file: goes with corpus 'own', not with {self.corpus!r}")
        if self.corpus == "own" and self.valid_size and not self.valid_file:
            raise ValueError(f"valid_size: {self.valid_size} goes with a valid_file; without one nothing is validated")
        if (self.source == "installed") != (self.corpus == "python"):
            raise ValueError(f"source: {self.source!r} does not go with corpus {self.corpus!r}")
        if (self.source == "folder") != bool(self.folder):
            raise ValueError(f"folder: {self.folder!r} does not go with source {self.source!r}")


class Text(Task):
    """The task: examples of a prompt and its answer, and how generated answers are scored."""

    Config = TextConfig
    config: TextConfig

    def __init__(self, config: TextConfig, tokenizer: Any = None):
        """tokenizer: the model's own, for `tokens: model`."""
        if (config.tokens == "model") != (tokenizer is not None):
            raise ValueError(f"tokens: {config.tokens!r} goes with {'a' if tokenizer is None else 'no'} tokenizer")
        from mutor.tasks import standins

        super().__init__(config, tokenizer or standins.tokenizer(config.tokens))
        changes = {k: getattr(config, k) for k in ("extract", "compare", "max_tokens", "new_tokens")}
        self.corpus = replace(CORPORA[config.corpus], **{k: v for k, v in changes.items() if v is not None})
        self.vocabulary = len(self.tokenizer) if tokenizer is None else None
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the model's tokenizer has no end token, which answers are ended by")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.pad_id = self.tokenizer.pad_token_id
        self.prefix_lm = config.prefix_lm and not self.corpus.learns_prompts
        self.selection_metric = "rougeL" if self.corpus.compare == "rouge" else "accuracy"
        splits = ("valid", "test") if self.chosen_on(config) else ("test",)
        self.problems = {split: self._problems(split) for split in splits}
        if config.corpus == "own":
            for found in self.problems.values():
                check_answers(found, self.corpus, self.score)
        self._encoded = {split: self.encode(found) for split, found in self.problems.items()}

    @staticmethod
    def describe(config: TextConfig) -> str:
        """The name of the corpus in tables."""
        return Path(config.train_file or "own").stem if config.corpus == "own" else config.corpus

    @classmethod
    def scored_on(cls, config: TextConfig) -> str:
        """The name of the benchmark in tables."""
        return CORPORA[config.corpus].benchmark or Path(config.test_file or "own").name

    @staticmethod
    def needs_tokenizer(config: TextConfig) -> bool:
        """Unless a stand-in's is asked for."""
        return config.tokens == "model"

    @staticmethod
    def check_settings(config: TextConfig, method_config: Any, where: str) -> None:
        """Raise ValueError for a method that can only give answers of one length."""
        if getattr(method_config, "fixed_length", False):
            raise ValueError(f"{where}: this method answers in a fixed number of tokens, texts end where they end")

    @staticmethod
    def chosen_on(config: TextConfig) -> str:
        """The test split for published datasets without another one; nothing for a user's own without a valid_file."""
        if config.corpus == "own":
            return "valid" if config.valid_file else ""
        corpus = CORPORA[config.corpus]
        return "test" if corpus.chosen_on(config.source) == corpus.test else "valid"

    def _problems(self, split: str) -> list[Problem]:
        c = self.config
        size = {"train": c.train_size, "valid": c.valid_size, "test": c.test_size}[split]
        own = {"train": c.train_file, "valid": c.valid_file, "test": c.test_file}[split]
        origin = Origin("file", own) if own else Origin(c.source, c.folder or "")
        found = problems(self.corpus, split, origin, size)
        if not found:
            raise ValueError(f"{self.describe(c)}: no {split} problems in {own or c.folder or c.source}")
        return with_gold(as_prompts(found, self.tokenizer), self.corpus) if own else found

    @cached_property
    def _training(self) -> list[Problem]:
        found = self._problems("train")
        if self.config.corpus == "own":
            check_apart(found, self.problems)
        return found

    def train(self, seed: int) -> Source:
        """Tokenised training examples, those longer than `max_tokens` dropped and counted; the same for all seeds."""
        return self._source

    def examples(self, split: str) -> list[tuple[np.ndarray, int]]:
        """The prompts of a split with their right answers, both together cut behind `max_tokens` tokens.

        A prompt that is as long has no answer left and is not among them. Raises ValueError where none is.
        """
        found, most = self._encoded[split], self.corpus.max_tokens
        cut = [(ids[:most], prefix) for ids, prefix in found if prefix < most]
        if not cut:
            raise ValueError(f"max_tokens: all {len(found)} {split} prompts have {most} tokens or more")
        return cut

    @cached_property
    def _source(self) -> Source:
        found = self._training
        if self.config.expect and self.data_hash() != self.config.expect:
            raise ValueError(f"expect: the data have hash {self.data_hash()}, not {self.config.expect}; refused")
        if not self.config.calculator:
            found = [replace(p, answer=_without_marks(p.answer)) for p in found]
        examples = self.encode(found, learn_prompts=self.corpus.learns_prompts)
        kept = [(ids, prefix) for ids, prefix in examples if len(ids) <= self.corpus.max_tokens]
        if not kept:
            raise ValueError(f"max_tokens: all {len(found)} examples are longer than {self.corpus.max_tokens} tokens")
        self.longest = max(len(ids) for ids, _ in kept)
        return Source(lambda index: [kept[i] for i in index], len(kept), dropped=len(found) - len(kept))

    def encode(self, found: Sequence[Problem], *, learn_prompts: bool = False) -> list[tuple[np.ndarray, int]]:
        """(token ids, prefix length): prompt and answer tokenised apart and joined, so their boundary is exact.

        learn_prompts: everything behind the first token is to be predicted, as in pretraining.
        """
        prompts = self.tokenizer([p.prompt for p in found])["input_ids"]
        answers = self.tokenizer([p.answer for p in found], add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return [
            (np.array([*prompt, *answer, end], dtype=np.int64), 1 if learn_prompts else len(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def score(self, output: str, gold: str) -> dict[str, float]:
        """Metrics of one answer: right (1) or wrong (0), or ROUGE F-measures, each 0 to 1.

        With mathematics also `out_of_time`: 1 where the comparison did not end, which counts as wrong.
        """
        if self.corpus.compare == "rouge":
            return rouge(output, gold)
        answer = EXTRACT[self.corpus.extract](output)
        ended = {"out_of_time": 0.0} if self.corpus.compare == "mathematics" else {}
        try:
            return {"accuracy": float(COMPARE[self.corpus.compare](answer, gold)), **ended}
        except TimeoutError:
            return {"accuracy": 0.0, "out_of_time": 1.0}

    def evaluate(
        self,
        model: Any,
        method: Method,
        context: Context,
        split: str,
        batch_size: int,
        predictions_file: Path | None = None,
        log: Log | None = None,
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Answers through lm-evaluation-harness, scored; and the loss of the right answers.

        A problem whose prompt leaves no room for an answer is not asked: its answer is empty and its score 0. All
        predictions are written to `predictions_file`. Answers are kept beside it as they come, so that a killed
        evaluation goes on. Scores of every problem come of all metrics but the loss.
        """
        from mutor.mtp.teacher_forcing import teacher_forced_scores
        from mutor.tasks.harness import evaluate

        found = self.problems[split]
        asked = self._asked(split, model.config.max_position_embeddings, log, method.behind_prompt)
        cache = predictions_file.with_suffix(".answers") if predictions_file else None
        answers, scored = evaluate(
            model,
            method,
            self.tokenizer,
            self.scored_on(self.config),
            [found[i] for i in asked],
            self.score,
            new_tokens=self.corpus.new_tokens,
            batch_size=batch_size,
            prefix_lm=context.prefix_lm,
            cache=cache,
            log=log,
        )
        outputs, scores = [""] * len(found), {name: np.zeros(len(found)) for name in scored}
        for i, answer in zip(asked.tolist(), answers, strict=True):
            outputs[i] = answer
        for name, values in scored.items():
            scores[name][asked] = values
        late = int(sum(scores.get("out_of_time", ())))
        if late and log:
            log(f"{late} of {len(found)} answers could not be compared in time and count as wrong")
        metrics = {name: 100 * float(values.mean()) for name, values in scores.items()}
        _, metrics["loss"] = teacher_forced_scores(model, method, context, self.examples(split), batch_size)
        if predictions_file:
            self._write_predictions(predictions_file, found, outputs, scores[self.selection_metric])
            for file in predictions_file.parent.glob(f"{predictions_file.stem}.answers*"):
                file.unlink()
        return metrics, scores if self.corpus.compare == "rouge" else {k: v.astype(bool) for k, v in scores.items()}

    def _asked(self, split: str, room: int, log: Log | None = None, behind_prompt: int = 0) -> np.ndarray:
        """Numbers of the problems whose prompts leave room for `new_tokens` in a model of `room` positions.

        log: told how many do not; behind_prompt: tokens that a method adds to each. Raises ValueError where none does.
        """
        new = self.corpus.new_tokens
        prompts = behind_prompt + np.array([prefix for _, prefix in self._encoded[split]])
        asked = np.flatnonzero(prompts + new <= room)
        if not len(asked):
            raise ValueError(
                f"new_tokens: {new}, and the shortest {split} prompt has {prompts.min()} tokens; allowed: {room} "
                "together, as the model has positions"
            )
        if log and len(asked) < len(prompts):
            log(
                f"{len(prompts) - len(asked)} of {len(prompts)} {split} prompts leave no room for {new} new tokens in "
                f"the model's {room} positions; they are not asked, and count as wrong"
            )
        return asked

    def _write_predictions(
        self, file: Path, found: Sequence[Problem], outputs: Sequence[str], values: np.ndarray
    ) -> None:
        lines = []
        for problem, output, value in zip(found, outputs, values.tolist(), strict=True):
            line = {"prompt": problem.prompt, "output": output, "gold": problem.gold, self.selection_metric: value}
            if self.corpus.compare != "rouge":
                line["answer"] = EXTRACT[self.corpus.extract](output)
            lines.append(json.dumps(line, ensure_ascii=False))
        write_text(file, "\n".join(lines) + "\n")

    def prepare(self, model: Any, log: Log | None = None, behind_prompt: int = 0) -> None:
        """Tell a new model its special tokens, so that its checkpoints answer and stop wherever they are loaded.

        Raises ValueError for examples that are longer than the model has positions, or where no prompt leaves room.
        """
        room = model.config.max_position_embeddings
        longest = max(self.longest, *(len(ids) for split in self.problems for ids, _ in self.examples(split)))
        longest += behind_prompt
        if longest > room:
            raise ValueError(
                f"max_tokens: prompts with their right answers have up to {longest} tokens; allowed: {room}, as the "
                "model has positions"
            )
        most = self.corpus.max_tokens
        for split, found in self._encoded.items():
            self._asked(split, room, log, behind_prompt)
            cut = sum(len(ids) > most for ids, _ in found)
            if log and cut:
                log(f"of {cut} of {len(found)} {split} problems the loss is that of the first {most} tokens")
        for config in (model.config, model.generation_config):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if getattr(config, name, None) is None:
                    setattr(config, name, getattr(self.tokenizer, name))

    def data_hash(self) -> str:
        """A hash of all problems, training ones included."""
        digest = hashlib.sha256()
        for found in (self._training, *self.problems.values()):
            for problem in found:
                digest.update(json.dumps([problem.prompt, problem.answer, problem.gold]).encode())
        return digest.hexdigest()[:16]

    def test_data_hash(self) -> str:
        """A hash of prompts and right answers, whichever tokens they are read as and whatever was learned from."""
        asked = [[problem.prompt, problem.gold] for problem in self.problems["test"]]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _without_marks(answer: str) -> str:
    import re

    return re.sub(r"<<[^<>]*>>", "", answer)
