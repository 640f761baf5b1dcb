"""What runs on the same images share: their tokenizer, a classifier or Inception to score by, and the images' codes.

assets = ImageAssets.made_once(config, Path("runs/laptop/assets"), "cpu", print)
assets.codes["train"][0]                       # uint8 [rows * columns]: the first training image as tokens
assets.book, assets.judge                      # tokenizer (diffusers' VQModel), what scores look through
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mutor.files import complete_folder, damage, locked, write_json
from mutor.streams import stream, torch_seed
from mutor.tasks.pictures import ImagesConfig, Pictures, Versions
from mutor.tasks.pictures import load as load_pictures
from mutor.tasks.task import Log

if TYPE_CHECKING:
    from torch import Tensor


# what decides tokenizer, classifier and codes; the rest may differ between datasets that share them
DECIDES = (
    "source",
    "folder",
    "classes",
    "pixels",
    "test_size",
    "copies",
    "flip",
    "shift",
    "turn",
    "zoom",
    "codes",
    "code_width",
    "channels",
    "tokenizer",
    "tokenizer_steps",
    "features",
    "classifier_steps",
    "real_samples",
    "data_seed",
)


@dataclass(frozen=True)
class ImageAssets:
    """Loaded assets.

    book: the tokenizer; judge: what gives features and classes of images; codes, labels: of the splits "train" and
    "test", [N, rows * columns] and [N]; real: features of real images, [N, d]; facts: what was measured when they were
    made (assets.json).
    """

    book: Any
    judge: Any
    codes: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    real: Tensor
    facts: dict[str, Any]

    @classmethod
    def made_once(cls, config: ImagesConfig, folder: Path, device: str, log: Log) -> ImageAssets:
        """Train tokenizer and classifier and encode all images, once below `folder` for all that share them; load."""
        decides = {key: getattr(config, key) for key in DECIDES}
        name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
        home = Path(folder) / f"{config.source}-{name}"
        with locked(Path(f"{home}.lock")):
            wrong = damage(home) if home.exists() else ""
            if wrong:
                log(f"{home} is damaged: {wrong}; it is made again")
            if wrong is not None:
                with complete_folder(home) as part:
                    make(config, part, device, log)
        return cls.load(config, home, device)

    @classmethod
    def load(cls, config: ImagesConfig, folder: Path, device: str) -> ImageAssets:
        """What `make` made in a folder."""
        import torch
        from diffusers import VQModel

        from mutor.tasks.image_scores import Classifier, Inception

        book = VQModel.from_pretrained(folder / "tokenizer").to(device).eval()
        judge: Any
        if config.features == "classifier":
            judge = Classifier(config.classes, book.config.in_channels, config.pixels).to(device).eval()
            judge.load_state_dict(torch.load(folder / "classifier.pt", weights_only=True))
        else:
            judge = Inception(device)
        return cls(
            book,
            judge,
            codes={split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "test")},
            labels={split: np.load(folder / f"{split}_labels.npy") for split in ("train", "test")},
            real=torch.from_numpy(np.load(folder / "real.npy")),
            facts=json.loads((folder / "assets.json").read_text()),
        )

    def data_hash(self) -> str:
        """A hash of all codes and labels."""
        digest = hashlib.sha256()
        for split in ("train", "test"):
            digest.update(np.ascontiguousarray(self.codes[split]).tobytes())
            digest.update(self.labels[split].tobytes())
        return digest.hexdigest()[:16]


def make(config: ImagesConfig, folder: Path, device: str, log: Log) -> None:
    """Make all assets in an empty folder."""
    import torch

    train, test = load_pictures(config)
    versions = Versions(train, config)
    book, judge = _trained(config, versions, test.batch(np.array([0])).shape[1], folder, device, log)
    for split, pictures in (("train", versions), ("test", test)):
        _encode(config, split, pictures, book, folder, log)
    real = stream("real_images", config.data_seed).permutation(len(train))[: config.real_samples]
    features = torch.cat([judge.judge(train.batch(part))[0] for part in _parts(real)])
    np.save(folder / "real.npy", features.numpy())
    made = {"config": asdict(config), "images": len(train), "held_out": len(test)}
    facts = _held_out(config, test, book, judge)
    book.save_pretrained(folder / "tokenizer")
    write_json(folder / "assets.json", made | facts)
    log(f"held-out images: tokenizer's squared error {facts['squared_error']:.4f} of {facts['variance']:.4f}")
    if config.features == "classifier":
        right, seen = facts["real_accuracy"], facts["reconstructed_accuracy"]
        log(f"held-out images: classifier right on {right:.1f}%, on {seen:.1f}% once decoded")


def _trained(
    config: ImagesConfig, versions: Versions, colours: int, folder: Path, device: str, log: Log
) -> tuple[Any, Any]:
    """The tokenizer, and the judge; a classifier is saved in the folder."""
    import torch

    from mutor.models import vq
    from mutor.tasks.image_scores import Classifier, Inception, train_classifier

    c = config
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
        judge: Any = Classifier(c.classes, colours, c.pixels).to(device)
    if not c.tokenizer:
        seed = torch_seed("tokenizer_batches", c.data_seed)
        vq.train(book, versions, steps=c.tokenizer_steps, batch_size=64, rate=2e-3, seed=seed, log=log)
    if c.features == "classifier":
        seed = torch_seed("classifier_batches", c.data_seed)
        train_classifier(judge, versions, steps=c.classifier_steps, batch_size=64, rate=3e-3, seed=seed, log=log)
        torch.save(judge.state_dict(), folder / "classifier.pt")
    else:
        judge = Inception(device)
    return book, judge


def _encode(config: ImagesConfig, split: str, pictures: Pictures | Versions, book: Any, folder: Path, log: Log) -> None:
    """Store the codes and labels of a split."""
    from mutor.models import vq

    kind = np.uint8 if config.codes <= 256 else np.uint16 if config.codes <= 65536 else np.int32
    stored = np.lib.format.open_memmap(
        folder / f"{split}.npy", mode="w+", dtype=kind, shape=(len(pictures), config.side**2)
    )
    for number, part in enumerate(_parts(len(pictures))):
        stored[part] = vq.encode(book, pictures.batch(part)).flatten(1).cpu().numpy()
        if number % 40 == 39:
            log(f"encoded {part[-1] + 1} of {len(pictures)} images")
    stored.flush()
    np.save(folder / f"{split}_labels.npy", pictures.labels.astype(np.int32))


def _held_out(config: ImagesConfig, test: Pictures, book: Any, judge: Any) -> dict[str, float]:
    """How well held-out images are known: squared error once decoded beside their variance, and the judge's accuracy.

    Accuracies, of images as they are and once decoded, are in percent, and 0 where features are not a classifier's.
    """
    import torch

    from mutor.models import vq

    error = variance = right = seen = 0.0
    for part in _parts(len(test)):
        images, labels = test.batch(part), torch.from_numpy(test.labels[part])
        shown = vq.decode(book, vq.encode(book, images)).cpu()
        error += (shown - images).square().mean().item() * len(part) / len(test)
        variance += images.var().item() * len(part) / len(test)
        if config.features == "classifier":
            right += 100 * (judge.judge(images)[1].argmax(1) == labels).double().sum().item() / len(test)
            seen += 100 * (judge.judge(shown)[1].argmax(1) == labels).double().sum().item() / len(test)
    return {"squared_error": error, "variance": variance, "real_accuracy": right, "reconstructed_accuracy": seen}


def _parts(what: int | np.ndarray, size: int = 250) -> list[np.ndarray]:
    """Indices (0 .. N - 1, or those given) in parts."""
    index = np.arange(what) if isinstance(what, int) else what
    return [index[start : start + size] for start in range(0, len(index), size)]


def _published(file: str) -> dict[str, Tensor]:
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"tokenizer: {file} can't be read: {error}") from None
    return found.get("model", found.get("ema", found))
