"""Class-conditional images as grids of tokens: data, their tokenizer, and how generated images are scored.

task = Images(ImagesConfig(source="digits", ...))
task.prepare_assets(Path("runs/laptop/assets"), "cpu", print)      # tokenizer, classifier and codes, made once
task.evaluate(model, method, Context(), "test", batch_size=100)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mutor.checks import setting
from mutor.results import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from mutor import data
    from mutor.method import Context, Method


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """The images, how they are augmented and made tokens, and how samples are drawn and scored."""

    source: str = setting("digits", doc="digits: scikit-learn's 8 x 8 handwritten digits", choices=("digits",))
    pixels: int = setting(16, doc="height and width that images are scaled to", low=8)
    test_size: int = setting(300, doc="images held out", low=10)
    copies: int = setting(10, doc="versions of each training image, the first as it is", low=1)
    shift: float = setting(1.0, doc="versions are shifted by at most so many pixels", low=0)
    turn: float = setting(8.0, doc="versions are turned by at most so many degrees", low=0, high=180)
    zoom: float = setting(0.08, doc="versions are scaled by at most 1 plus or minus this", low=0, high=0.5)
    codes: int = setting(64, doc="size of the tokenizer's codebook", low=2)
    code_width: int = setting(8, doc="width of its vectors", low=1)
    channels: tuple = setting((16, 32), doc="of its levels; each but the last halves height and width")
    tokenizer_steps: int = setting(400, doc="how long the tokenizer is trained", low=1)
    classifier_steps: int = setting(600, doc="how long the classifier is trained that features come from", low=1)
    valid_samples: int = setting(200, doc="images drawn during training", low=10)
    test_samples: int = setting(2000, doc="images drawn at the end", low=10)
    guidance: float = setting(2.0, doc="of classifier-free guidance; 1: none", low=0)
    temperature: float = setting(1.0, doc="of sampling", low=0, open_ends=True)
    top_k: int = setting(0, doc="only so many codes are drawn from; 0: all", low=0)
    sample_seed: int = setting(0, doc="noise of the samples, the same for all models", low=0)
    data_seed: int = setting(0, doc="of the held-out images and the versions", low=0)

    @property
    def side(self) -> int:
        """Height and width of the token grid."""
        return self.pixels // 2 ** (len(self.channels) - 1)

    def __post_init__(self) -> None:
        if self.pixels % 2 ** (len(self.channels) - 1) or self.pixels % 4:
            raise ValueError(f"pixels: {self.pixels} is not divisible by 4 and by the tokenizer's downsampling")


# what decides tokenizer, classifier and codes; the rest may differ between datasets that share them
ASSETS = (
    "source", "pixels", "test_size", "copies", "shift", "turn", "zoom", "codes", "code_width", "channels",
    "tokenizer_steps", "classifier_steps", "data_seed",
)  # fmt: skip


class Images:
    """The task: class token and codes of an image, and scores of drawn images."""

    Config = ImagesConfig
    benchmark = "class_accuracy"
    higher_is_better = True
    prefix_lm = False
    tokenizer = None
    pad_id = 0

    def __init__(self, config: ImagesConfig, tokenizer: Any = None):
        """tokenizer: none; images have their own, which `prepare_assets` makes."""
        import mutor.models.llamagen  # noqa: F401  # transformers learns its name

        self.config, self.classes = config, 10
        self.vocabulary = config.codes + self.classes + 1
        self.folder: Path | None = None

    @staticmethod
    def describe(config: ImagesConfig) -> str:
        """The name of the images in tables."""
        return config.source

    scored_on = describe

    @staticmethod
    def check_settings(config: ImagesConfig, method_config: Any, where: str) -> None:
        """Raise ValueError for a method whose answers are not drawn."""
        if getattr(method_config, "fixed_length", False):
            raise ValueError(f"{where}: this method's answers are not drawn token by token, as images are")

    def prepare_assets(self, folder: Path, device: str, say: Callable[[str], None]) -> None:
        """Train tokenizer and classifier and encode all images, once for all runs that share them; then load them."""
        decides = {key: getattr(self.config, key) for key in ASSETS}
        name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
        self.folder = Path(folder) / f"{self.config.source}-{name}"
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.folder}.lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not (self.folder / "assets.json").exists():
                part = self.folder.with_name(self.folder.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                self._make(part, device, say)
                shutil.rmtree(self.folder, ignore_errors=True)
                part.rename(self.folder)
        self._load(device)

    def _make(self, folder: Path, device: str, say: Callable[[str], None]) -> None:
        import torch

        from mutor.models import vq
        from mutor.tasks.image_scores import Classifier, train_classifier

        c = self.config
        train, test = read(c)
        versions = augmented(train[0], c)
        labels = train[1].repeat(c.copies)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.data_seed)
            book = vq.build(
                codes=c.codes, width=c.code_width, channels=c.channels, latent=c.channels[-1], layers=1,
                groups=8, colours=versions.shape[1],
            ).to(device)  # fmt: skip
            judge = Classifier(self.classes, versions.shape[1], c.pixels).to(device)
        vq.train(book, versions, steps=c.tokenizer_steps, batch_size=64, rate=2e-3, seed=c.data_seed, say=say)
        train_classifier(
            judge, versions, labels, steps=c.classifier_steps, batch_size=64, rate=3e-3, seed=c.data_seed, say=say
        )
        kind = np.uint8 if c.codes <= 256 else np.uint16 if c.codes <= 65536 else np.int32
        for split, images, names in (("train", versions, labels), ("test", *test)):
            found = torch.cat([vq.encode(book, part).cpu() for part in images.split(500)])
            np.save(folder / f"{split}.npy", found.flatten(1).numpy().astype(kind))
            np.save(folder / f"{split}_labels.npy", names.numpy().astype(np.int32))
        shown = torch.cat([vq.decode(book, vq.encode(book, part)).cpu() for part in test[0].split(500)])
        right = judge.judge(test[0])[1].argmax(1) == test[1]
        seen = judge.judge(shown)[1].argmax(1) == test[1]
        book.save_pretrained(folder / "tokenizer")
        torch.save(judge.state_dict(), folder / "classifier.pt")
        made = {
            "config": asdict(c), "squared_error": (shown - test[0]).square().mean().item(),
            "variance": test[0].var().item(), "real_accuracy": 100 * right.double().mean().item(),
            "reconstructed_accuracy": 100 * seen.double().mean().item(),
            "codes_used": len(np.unique(np.load(folder / "train.npy"))),
        }  # fmt: skip
        write_json(folder / "assets.json", made)
        say(
            f"held-out images: tokenizer's squared error {made['squared_error']:.4f} of {made['variance']:.4f}; "
            f"classifier right on {made['real_accuracy']:.1f}%, on {made['reconstructed_accuracy']:.1f}% once decoded"
        )

    def _load(self, device: str) -> None:
        import torch
        from diffusers import VQModel

        from mutor.tasks.image_scores import Classifier

        assert self.folder is not None
        self.assets = json.loads((self.folder / "assets.json").read_text())
        self.book = VQModel.from_pretrained(self.folder / "tokenizer").to(device).eval()
        self.judge = Classifier(self.classes, self.book.config.in_channels, self.config.pixels).to(device).eval()
        self.judge.load_state_dict(torch.load(self.folder / "classifier.pt", weights_only=True))
        self.codes = {split: np.load(self.folder / f"{split}.npy", mmap_mode="r") for split in ("train", "test")}
        self.labels = {split: np.load(self.folder / f"{split}_labels.npy") for split in ("train", "test")}
        train, test = read(self.config)
        self.real = self.judge.judge(torch.cat([train[0], test[0]]))[0]

    def train(self, seed: int) -> data.Source:
        """All versions of all training images, in an order of the run's seed."""
        from mutor.data import Source

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
        self, model: Any, method: Method, context: Context, split: str, batch_size: int, keep: Path | None = None,
        say: Any = None,
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:  # fmt: skip
        """Draw images of all classes in turn and score them; the loss is that of held-out images.

        keep: predictions-NAME.jsonl; a grid of samples is drawn beside it as samples-NAME.png. Returns the metrics, and
        of class_accuracy the score of every image, bool [N].
        """
        import torch

        from mutor.data import score_forced
        from mutor.tasks.image_scores import frechet_distance, inception_score, precision_recall

        c = self.config
        count = c.test_samples if split == "test" else c.valid_samples
        labels = torch.arange(count) % self.classes
        images = self.draw(model, labels, batch_size, say)
        features, logits = self.judge.judge(images)
        right = (logits.argmax(1) == labels).numpy()
        index = np.arange(len(self.codes["test"]))
        _, loss = score_forced(model, method, context, self._examples("test", index), batch_size)
        precision, recall = precision_recall(self.real, features)
        metrics = {
            "class_accuracy": 100 * float(right.mean()), "real_class_accuracy": self.assets["real_accuracy"],
            "classifier_fid": frechet_distance(self.real, features), "classifier_score": inception_score(logits),
            "precision": precision, "recall": recall, "loss": loss,
        }  # fmt: skip
        if keep:
            picture = keep.with_name(f"{keep.stem.replace('predictions', 'samples')}.png")
            save_grid(images[: 10 * self.classes], self.classes, picture)
        return metrics, {"class_accuracy": right}

    def draw(self, model: Any, labels: Tensor, batch_size: int, say: Any = None) -> Tensor:
        """Images [N, C, H, W] of classes [N]; seed and batch size decide the noise, so equal models draw equal ones."""
        import torch

        from mutor.models import vq
        from mutor.models.llamagen import sample

        c, parts = self.config, []
        for number, part in enumerate(labels.split(batch_size)):
            codes = sample(
                model, part, seed=c.sample_seed + number, guidance=c.guidance, temperature=c.temperature, top_k=c.top_k
            )
            parts.append(vq.decode(self.book, codes.view(-1, c.side, c.side)).cpu())
            if say and (number + 1) % 5 == 0:
                say(f"drawn {min((number + 1) * batch_size, len(labels))} of {len(labels)} images")
        return torch.cat(parts)

    def data_hash(self) -> str:
        """A hash of all codes and labels."""
        digest = hashlib.sha256()
        for split in ("train", "test"):
            digest.update(np.ascontiguousarray(self.codes[split]).tobytes())
            digest.update(self.labels[split].tobytes())
        return digest.hexdigest()[:16]


def read(config: ImagesConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) to train on, (images, labels) held out); images float [N, 1, H, W] in -1 .. 1."""
    import torch
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, size=config.pixels, mode="bilinear", align_corners=False)
    labels = torch.tensor(found.target)
    order = torch.from_numpy(np.random.default_rng([config.data_seed, 11]).permutation(len(images)))
    test, train = order[: config.test_size], order[config.test_size :]
    return (images[train], labels[train]), (images[test], labels[test])


def augmented(images: Tensor, config: ImagesConfig) -> Tensor:
    """`copies` versions of images [N, C, H, W], [copies x N, C, H, W], the first as they are; none changes a class."""
    import torch

    rng, parts = np.random.default_rng([config.data_seed, 12]), [images]
    for _ in range(config.copies - 1):
        angle = np.deg2rad(rng.uniform(-config.turn, config.turn, len(images)))
        scale = 1 / rng.uniform(1 - config.zoom, 1 + config.zoom, len(images))
        moved = rng.uniform(-1, 1, (len(images), 2)) * 2 * config.shift / config.pixels
        matrix = np.zeros((len(images), 2, 3))
        matrix[:, 0, 0] = matrix[:, 1, 1] = scale * np.cos(angle)
        matrix[:, 0, 1], matrix[:, 1, 0] = -scale * np.sin(angle), scale * np.sin(angle)
        matrix[:, :, 2] = moved
        grid = torch.nn.functional.affine_grid(torch.tensor(matrix).float(), list(images.shape), align_corners=False)
        lowest = images.min()
        version = torch.nn.functional.grid_sample(images - lowest, grid, align_corners=False)
        parts.append(version + lowest)
    return torch.cat(parts)


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
