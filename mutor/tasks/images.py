"""Class-conditional images as grids of tokens: data, their tokenizer, and how generated images are scored.

task = Images(ImagesConfig(source="digits", ...))
task.prepare_assets(Path("runs/laptop/assets"), "cpu", print)      # tokenizer, classifier and codes, made once
task.evaluate(model, method, Context(), "test", batch_size=100)
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mutor.streams import stream, torch_seed
from mutor.tasks.image_assets import ImageAssets
from mutor.tasks.pictures import ImagesConfig
from mutor.tasks.task import Log, Source, Task

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.method import Context, Method


class Images(Task):
    """The task: class token and codes of an image, and scores of drawn images."""

    Config = ImagesConfig
    config: ImagesConfig
    selection_metric = "log_likelihood"  # tables show the last checkpoint, and those on the way
    pad_id = 0
    greedy = False
    assets: ImageAssets  # from `prepare_assets` on

    def __init__(self, config: ImagesConfig, tokenizer: Any = None):
        """tokenizer: none; images have their own, which `prepare_assets` makes."""
        import mutor.models.llamagen  # noqa: F401  # transformers learns its name

        super().__init__(config)
        self.vocabulary = config.codes + config.classes + 1

    @staticmethod
    def describe(config: ImagesConfig) -> str:
        """The name of the images in tables: of a folder imagenet/train at 256 pixels, imagenet-256."""
        if config.source != "folder":
            return config.source
        folder = Path(config.folder or "")
        return f"{folder.parent.name if folder.name in ('train', 'val', 'test') else folder.name}-{config.pixels}"

    @staticmethod
    def check_settings(config: ImagesConfig, method_config: Any, where: str) -> None:
        """Raise ValueError for a method whose answers are not drawn."""
        if getattr(method_config, "fixed_length", False):
            raise ValueError(f"{where}: this method's answers are not drawn token by token, as images are")

    def prepare_assets(self, folder: Path, device: str, log: Log) -> None:
        """Make tokenizer, classifier and codes, once for all runs that share them; then load them."""
        self.assets = ImageAssets.made_once(self.config, folder, device, log)

    def train(self, seed: int) -> Source:
        """All versions of all training images, in an order of the run's seed."""
        return Source(lambda index: self._encoded("train", index), len(self.assets.codes["train"]))

    def examples(self, split: str) -> list[tuple[np.ndarray, int]]:
        """Every second held-out image: one half for validation, the other for test."""
        return self._encoded("test", np.arange(int(split == "test"), len(self.assets.codes["test"]), 2))

    def _encoded(self, split: str, index: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """(class token and codes, prefix length 1)."""
        found = self.assets.codes[split][index].astype(np.int64)
        named = self.assets.labels[split][index].astype(np.int64)[:, None] + self.config.codes
        return [(ids, 1) for ids in np.concatenate([named, found], 1)]

    def prepare(self, model: Any, log: Log | None = None, behind_prompt: int = 0) -> None:
        """Raises ValueError where the model's grid, codes or classes are not these images'."""
        side = self.config.side
        here = {"codes": self.config.codes, "classes": self.config.classes, "rows": side, "columns": side}
        for name, wanted in here.items():
            found = getattr(model.config, name, None)
            if found != wanted:
                raise ValueError(f"model config: {name}: {found}, allowed for these images: {wanted}")

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
        """Draw images of random classes and score them; the loss is that of held-out images.

        A grid of samples is drawn beside predictions-NAME.jsonl as samples-NAME.png. Scores of every image come of
        class_accuracy, where features are a classifier's.
        """
        import torch

        from mutor.mtp.teacher_forcing import teacher_forced_scores
        from mutor.tasks.image_scores import distance_to, frechet_distance, inception_score, precision_recall

        c, assets = self.config, self.assets
        labels = torch.from_numpy(self.classes(split))
        images = self.draw(model, method, labels, batch_size, log)
        features, logits = assets.judge.judge(images)
        _, loss = teacher_forced_scores(model, method, context, self.examples(split), batch_size)
        precision, recall = precision_recall(assets.real, features)
        distance = (
            frechet_distance(assets.real, features) if c.reference is None else distance_to(c.reference, features)
        )
        metrics, scores = {}, {}
        if c.features == "classifier":
            scores["class_accuracy"] = (logits.argmax(1) == labels).numpy()
            metrics["class_accuracy"] = 100 * float(scores["class_accuracy"].mean())
            metrics["real_class_accuracy"] = assets.facts["real_accuracy"]
        names = ("classifier_fid", "classifier_score") if c.features == "classifier" else ("fid", "inception_score")
        metrics |= dict(zip(names, (distance, inception_score(logits)), strict=True))
        metrics |= {"precision": precision, "recall": recall, "loss": loss, "log_likelihood": -loss}
        metrics["tokenizer_squared_error"] = assets.facts["squared_error"]
        if predictions_file:
            picture = predictions_file.with_name(f"{predictions_file.stem.replace('predictions', 'samples')}.png")
            save_grid(images, labels, picture)
        return metrics, scores

    def classes(self, split: str) -> np.ndarray:
        """int64 [N]: classes of the images to draw, uniformly at random as by LlamaGen; the same for all models."""
        count = self.config.test_samples if split == "test" else self.config.valid_samples
        return stream("image_classes", self.config.sample_seed).integers(self.config.classes, size=count)

    def draw(self, model: Any, method: Method, labels: Tensor, batch_size: int, log: Log | None = None) -> Tensor:
        """Images [N, C, H, W] of classes [N]; seed and batch size decide the noise, so equal models draw equal ones."""
        import torch

        from mutor.models import vq
        from mutor.models.llamagen import image_prompts

        c, parts = self.config, []
        for number, part in enumerate(labels.split(batch_size)):
            prompts = image_prompts(
                model,
                part,
                seed=torch_seed("image_noise", c.sample_seed, number),
                guidance=c.guidance,
                temperature=c.temperature,
                top_k=c.top_k,
                compiled=model.device.type == "cuda",
            )
            codes = method.answer(model, prompts)[: len(part)]
            parts.append(vq.decode(self.assets.book, codes.view(-1, c.side, c.side)).cpu())
            if log and (number + 1) % 5 == 0:
                log(f"drawn {min((number + 1) * batch_size, len(labels))} of {len(labels)} images")
        return torch.cat(parts)

    def data_hash(self) -> str:
        """A hash of all codes and labels."""
        return self.assets.data_hash()

    def test_data_hash(self) -> str:
        """A hash of the held-out images that the loss is of, and of the classes and the noise that are drawn from."""
        drawn = [self.config.sample_seed, self.classes("test").tolist()]
        return hashlib.sha256(repr([super().test_data_hash(), drawn]).encode()).hexdigest()[:16]


def save_grid(images: Tensor, labels: Tensor, file: Path, shown: int = 10) -> None:
    """A picture of images [N, C, H, W] of classes [N]: a column a class, up to `shown` of each of the first `shown`."""
    import torch
    from PIL import Image

    columns = [images[labels == label][:shown] for label in range(min(int(labels.max()) + 1, shown))]
    rows = max(map(len, columns))
    filled = [torch.cat([found, found.new_zeros(rows - len(found), *images.shape[1:])]) for found in columns]
    board = torch.nn.functional.pad(torch.stack(filled, 1), (1, 1, 1, 1), value=0.0)
    _, _, colours, height, width = board.shape
    board = board.permute(0, 3, 1, 4, 2).reshape(rows * height, len(columns) * width, colours)
    pixels = ((board + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if colours == 1 else pixels)
    picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST).save(file)
