"""Class-conditional images as grids of tokens: data, their tokenizer, and how generated images are scored.

task = Images(ImagesConfig(source="digits", ...))
task.prepare_assets(Path("runs/laptop/assets"), "cpu", print)      # tokenizer, classifier and codes, made once
task.evaluate(model, method, Context(), "test", batch_size=100)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mutor.files import complete_folder, locked, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.method import Context, Method
    from mutor.tasks.task import Source
from mutor.tasks.image_assets import ASSETS, _parts, _published
from mutor.tasks.pictures import ImagesConfig


class Images:
    """The task: class token and codes of an image, and scores of drawn images."""

    Config = ImagesConfig
    selection_metric = "log_likelihood"  # what names the best checkpoint; tables show the last and those on the way
    higher_is_better = True
    prefix_lm = False
    tokenizer = None
    pad_id = 0

    def __init__(self, config: ImagesConfig, tokenizer: Any = None):
        """tokenizer: none; images have their own, which `prepare_assets` makes."""
        import mutor.models.llamagen  # noqa: F401  # transformers learns its name

        self.config, self.classes = config, config.classes
        self.vocabulary = config.codes + self.classes + 1
        self.folder: Path | None = None

    @staticmethod
    def describe(config: ImagesConfig) -> str:
        """The name of the images in tables: of a folder imagenet/train at 256 pixels, imagenet-256."""
        if config.source != "folder":
            return config.source
        folder = Path(config.folder or "")
        return f"{folder.parent.name if folder.name in ('train', 'val', 'test') else folder.name}-{config.pixels}"

    scored_on = describe

    @staticmethod
    def check_settings(config: ImagesConfig, method_config: Any, where: str) -> None:
        """Raise ValueError for a method whose answers are not drawn."""
        if getattr(method_config, "fixed_length", False):
            raise ValueError(f"{where}: this method's answers are not drawn token by token, as images are")

    def prepare_assets(self, folder: Path, device: str, log: Callable[[str], None]) -> None:
        """Train tokenizer and classifier and encode all images, once for all runs that share them; then load them."""
        decides = {key: getattr(self.config, key) for key in ASSETS}
        name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
        self.folder = Path(folder) / f"{self.config.source}-{name}"
        with locked(Path(f"{self.folder}.lock")):
            if not (self.folder / "assets.json").exists():
                with complete_folder(self.folder) as part:
                    self._make(part, device, log)
        self._load(device)

    def _make(self, folder: Path, device: str, log: Callable[[str], None]) -> None:
        import torch

        from mutor.models import vq
        from mutor.tasks.image_scores import Classifier, Inception, train_classifier
        from mutor.tasks.pictures import Versions, load

        c = self.config
        train, test = load(c)
        versions = Versions(train, c)
        colours = test.batch(np.array([0])).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.data_seed)
            if c.tokenizer:
                book = vq.convert(_published(c.tokenizer), **vq.VQ16).to(device)
            else:
                book = vq.build(
                    codes=c.codes,
                    width=c.code_width,
                    channels=c.channels,
                    latent=c.channels[-1],
                    layers=1,
                    groups=8,
                    colours=colours,
                ).to(device)
            judge: Any = Classifier(self.classes, colours, c.pixels).to(device)
        made = {"config": asdict(c), "images": len(train), "held_out": len(test)}
        if not c.tokenizer:
            vq.train(book, versions, steps=c.tokenizer_steps, batch_size=64, rate=2e-3, seed=c.data_seed, log=log)
        if c.features == "classifier":
            train_classifier(
                judge, versions, steps=c.classifier_steps, batch_size=64, rate=3e-3, seed=c.data_seed, log=log
            )
            torch.save(judge.state_dict(), folder / "classifier.pt")
        else:
            judge = Inception(device)
        kind = np.uint8 if c.codes <= 256 else np.uint16 if c.codes <= 65536 else np.int32
        for split, pictures in (("train", versions), ("test", test)):
            stored = np.lib.format.open_memmap(
                folder / f"{split}.npy", mode="w+", dtype=kind, shape=(len(pictures), c.side**2)
            )
            for number, part in enumerate(_parts(len(pictures))):
                stored[part] = vq.encode(book, pictures.batch(part)).flatten(1).cpu().numpy()
                if number % 40 == 39:
                    log(f"encoded {part[-1] + 1} of {len(pictures)} images")
            stored.flush()
            np.save(folder / f"{split}_labels.npy", pictures.labels.astype(np.int32))
        real = np.random.default_rng([c.data_seed, 13]).permutation(len(train))[: c.real_samples]
        features = torch.cat([judge.judge(train.batch(part))[0] for part in _parts(real)])
        np.save(folder / "real.npy", features.numpy())
        error = variance = right = seen = 0.0
        for part in _parts(len(test)):
            images, labels = test.batch(part), torch.from_numpy(test.labels[part])
            shown = vq.decode(book, vq.encode(book, images)).cpu()
            error += (shown - images).square().mean().item() * len(part) / len(test)
            variance += images.var().item() * len(part) / len(test)
            if c.features == "classifier":
                right += 100 * (judge.judge(images)[1].argmax(1) == labels).double().sum().item() / len(test)
                seen += 100 * (judge.judge(shown)[1].argmax(1) == labels).double().sum().item() / len(test)
        book.save_pretrained(folder / "tokenizer")
        made |= {"squared_error": error, "variance": variance, "real_accuracy": right, "reconstructed_accuracy": seen}
        write_json(folder / "assets.json", made)
        log(f"held-out images: tokenizer's squared error {error:.4f} of {variance:.4f}")
        if c.features == "classifier":
            log(f"held-out images: classifier right on {right:.1f}%, on {seen:.1f}% once decoded")

    def _load(self, device: str) -> None:
        import torch
        from diffusers import VQModel

        from mutor.tasks.image_scores import Classifier, Inception

        assert self.folder is not None
        self.assets = json.loads((self.folder / "assets.json").read_text())
        self.book = VQModel.from_pretrained(self.folder / "tokenizer").to(device).eval()
        self.judge: Any
        if self.config.features == "classifier":
            self.judge = Classifier(self.classes, self.book.config.in_channels, self.config.pixels).to(device).eval()
            self.judge.load_state_dict(torch.load(self.folder / "classifier.pt", weights_only=True))
        else:
            self.judge = Inception(device)
        self.codes = {split: np.load(self.folder / f"{split}.npy", mmap_mode="r") for split in ("train", "test")}
        self.labels = {split: np.load(self.folder / f"{split}_labels.npy") for split in ("train", "test")}
        self.real = torch.from_numpy(np.load(self.folder / "real.npy"))

    def train(self, seed: int) -> Source:
        """All versions of all training images, in an order of the run's seed."""
        from mutor.tasks.task import Source

        return Source(lambda index: self._examples("train", index), len(self.codes["train"]))

    def _examples(self, split: str, index: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """(class token and codes, prefix length 1)."""
        found = self.codes[split][index].astype(np.int64)
        named = self.labels[split][index].astype(np.int64)[:, None] + self.config.codes
        return [(ids, 1) for ids in np.concatenate([named, found], 1)]

    def prepare(self, model: Any) -> None:
        """Raises ValueError where the model's grid, codes or classes are not these images'."""
        side = self.config.side
        here = {"codes": self.config.codes, "classes": self.classes, "rows": side, "columns": side}
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
        log: Any = None,
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Draw images of all classes in turn and score them; the loss is that of held-out images.

        keep: predictions-NAME.jsonl; a grid of samples is drawn beside it as samples-NAME.png. Returns the metrics, and
        of class_accuracy, where features are a classifier's, the score of every image, bool [N].
        """
        import torch

        from mutor.mtp.teacher_forcing import teacher_forced_scores
        from mutor.tasks.image_scores import distance_to, frechet_distance, inception_score, precision_recall

        c = self.config
        count = c.test_samples if split == "test" else c.valid_samples
        labels = torch.arange(count) % self.classes
        images = self.draw(model, labels, batch_size, log)
        features, logits = self.judge.judge(images)
        index = np.arange(len(self.codes["test"]))
        _, loss = teacher_forced_scores(model, method, context, self._examples("test", index), batch_size)
        precision, recall = precision_recall(self.real, features)
        distance = frechet_distance(self.real, features) if c.reference is None else distance_to(c.reference, features)
        metrics, scores = {}, {}
        if c.features == "classifier":
            scores["class_accuracy"] = (logits.argmax(1) == labels).numpy()
            metrics["class_accuracy"] = 100 * float(scores["class_accuracy"].mean())
            metrics["real_class_accuracy"] = self.assets["real_accuracy"]
        names = ("classifier_fid", "classifier_score") if c.features == "classifier" else ("fid", "inception_score")
        metrics |= dict(zip(names, (distance, inception_score(logits)), strict=True))
        metrics |= {"precision": precision, "recall": recall, "loss": loss, "log_likelihood": -loss}
        metrics["tokenizer_squared_error"] = self.assets["squared_error"]
        if predictions_file:
            picture = predictions_file.with_name(f"{predictions_file.stem.replace('predictions', 'samples')}.png")
            save_grid(images[: 10 * self.classes], self.classes, picture)
        return metrics, scores

    def draw(self, model: Any, labels: Tensor, batch_size: int, log: Any = None) -> Tensor:
        """Images [N, C, H, W] of classes [N]; seed and batch size decide the noise, so equal models draw equal ones."""
        import torch

        from mutor.models import vq
        from mutor.models.llamagen import sample

        c, parts = self.config, []
        for number, part in enumerate(labels.split(batch_size)):
            codes = sample(
                model,
                part,
                seed=c.sample_seed + number,
                guidance=c.guidance,
                temperature=c.temperature,
                top_k=c.top_k,
                compiled=model.device.type == "cuda",
            )
            parts.append(vq.decode(self.book, codes.view(-1, c.side, c.side)).cpu())
            if log and (number + 1) % 5 == 0:
                log(f"drawn {min((number + 1) * batch_size, len(labels))} of {len(labels)} images")
        return torch.cat(parts)

    def data_hash(self) -> str:
        """A hash of all codes and labels."""
        digest = hashlib.sha256()
        for split in ("train", "test"):
            digest.update(np.ascontiguousarray(self.codes[split]).tobytes())
            digest.update(self.labels[split].tobytes())
        return digest.hexdigest()[:16]


def save_grid(images: Tensor, columns: int, file: Path) -> None:
    """A picture of images [N, C, H, W], row by row with lines between; a column is a class where they come in turn."""
    import torch
    from PIL import Image

    rows = len(images) // columns
    framed = torch.nn.functional.pad(images[: rows * columns], (1, 1, 1, 1), value=0.0)
    _, colours, height, width = framed.shape
    board = framed.view(rows, columns, colours, height, width).permute(0, 3, 1, 4, 2)
    pixels = ((board.reshape(rows * height, columns * width, colours) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if colours == 1 else pixels)
    picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST).save(file)
