"""Images with their classes, read when they are needed: scikit-learn's digits, Fashion-MNIST, or a folder of files.

train, test = load(ImagesConfig(source="digits"))
train.batch(np.array([0, 5]))          # float [2, C, H, W] in -1 .. 1
Versions(train, config).batch(...)     # the same, shifted, turned, zoomed or mirrored: copies x N of them
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mutor.checks import setting
from mutor.streams import stream

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
FASHION = {"train": "train", "test": "t10k"}


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """The images, how they are augmented and made tokens, and how samples are drawn and scored."""

    source: str = setting(
        "digits",
        doc="scikit-learn's digits, Fashion-MNIST, or a folder with one folder of files a class",
        choices=("digits", "fashion-mnist", "folder"),
    )
    folder: str | None = setting(
        None, doc="of the files; fashion-mnist: of its idx files, none: from the hub", on_disk="folder"
    )
    classes: int = setting(10, doc="how many classes there are", low=1)
    pixels: int = setting(16, doc="height and width that images are scaled to", low=8)
    test_size: int = setting(300, doc="images held out: half to choose the best checkpoint, half to score it", low=10)
    copies: int = setting(10, doc="versions of each training image, the first as it is", low=1)
    flip: bool = setting(False, doc="every second version is mirrored; not where that changes a class")
    shift: float = setting(1.0, doc="versions are shifted by at most so many pixels", low=0)
    turn: float = setting(8.0, doc="versions are turned by at most so many degrees", low=0, high=180)
    zoom: float = setting(0.08, doc="versions are scaled by at most 1 plus or minus this", low=0, high=0.5)
    codes: int = setting(64, doc="size of the tokenizer's codebook", low=2)
    code_width: int = setting(8, doc="width of its vectors", low=1)
    channels: tuple = setting((16, 32), doc="of its levels; each but the last halves height and width")
    tokenizer: str | None = setting(
        None, doc="a published checkpoint of VQ-16 (vq_ds16_c2i.pt), instead of training one", on_disk="file"
    )
    tokenizer_steps: int = setting(400, doc="how long the tokenizer is trained", low=1)
    features: str = setting(
        "classifier",
        doc="what scores look at: a small classifier trained here, or Inception (through torch-fidelity)",
        choices=("classifier", "inception"),
    )
    classifier_steps: int = setting(600, doc="how long the classifier is trained", low=1)
    reference: str | None = setting(
        None, doc="with inception: ADM's file of reference statistics (.npz), for the FID", on_disk="file"
    )
    real_samples: int = setting(10000, doc="at most so many real images are compared with", low=10)
    valid_samples: int = setting(200, doc="images drawn during training, of random classes", low=10)
    test_samples: int = setting(2000, doc="images drawn at the end, of random classes as by LlamaGen", low=10)
    guidance: float = setting(2.0, doc="of classifier-free guidance; 1: none", low=0)
    temperature: float = setting(1.0, doc="of sampling", low=0, open_ends=True)
    top_k: int = setting(0, doc="only so many codes are drawn from; 0: all", low=0)
    sample_seed: int = setting(0, doc="classes and noise of the samples, the same for all models", low=0)
    data_seed: int = setting(0, doc="of the held-out images and the versions", low=0)

    @property
    def side(self) -> int:
        """Height and width of the token grid."""
        return self.pixels // 2 ** (len(self.channels) - 1)

    def __post_init__(self) -> None:
        if (self.source == "folder") > bool(self.folder):
            raise ValueError("folder: missing, source 'folder' needs one with a folder of images for each class")
        if self.source == "digits" and self.folder:
            raise ValueError(f"folder: {self.folder!r} means nothing with source 'digits'")
        if self.reference and self.features != "inception":
            raise ValueError("reference: goes with features: inception")
        if self.tokenizer and (self.codes, self.code_width, len(self.channels)) != (16384, 8, 5):
            raise ValueError("tokenizer: VQ-16 needs codes: 16384, code_width: 8, channels: [128, 128, 256, 256, 512]")
        if self.pixels % 2 ** (len(self.channels) - 1) or self.pixels % 4:
            raise ValueError(f"pixels: {self.pixels} is not divisible by 4 and by the tokenizer's downsampling")


@dataclass(frozen=True)
class Pictures:
    """labels: int64 [N]; batch: indices [B] -> float [B, C, H, W] in -1 .. 1."""

    labels: np.ndarray
    batch: Callable[[np.ndarray], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: np.ndarray) -> Pictures:
        """Some of them."""
        return Pictures(self.labels[index], lambda chosen: self.batch(index[chosen]))


class Versions:
    """`copies` versions of each picture, the first as it is: item v N + i is version v of picture i, of its class.

    Version v is drawn from (data_seed, v, i) alone. With `flip` every second one is mirrored.
    """

    def __init__(self, pictures: Pictures, config: ImagesConfig):
        self.pictures, self.config = pictures, config
        self.labels = np.tile(pictures.labels, config.copies)
        self._draws: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: np.ndarray) -> Tensor:
        """float [B, C, H, W]."""
        import torch

        number, picture = np.divmod(index, len(self.pictures))
        images = self.pictures.batch(picture)
        out = torch.empty_like(images)
        for v in np.unique(number):
            rows = torch.from_numpy(np.flatnonzero(number == v))
            out[rows] = self._version(images[rows], int(v), picture[number == v])
        return out

    def _version(self, images: Tensor, number: int, picture: np.ndarray) -> Tensor:
        import torch

        c = self.config
        if number == 0:
            return images
        if c.flip and number % 2:
            images = images.flip(-1)
        if not (c.turn or c.zoom or c.shift):
            return images
        if number not in self._draws:
            rng = stream("image_versions", c.data_seed, number)
            self._draws[number] = rng.uniform(-1, 1, (len(self.pictures), 4))
        draw = self._draws[number][picture]
        angle, scale = np.deg2rad(c.turn * draw[:, 0]), 1 / (1 + c.zoom * draw[:, 1])
        matrix = np.zeros((len(images), 2, 3))
        matrix[:, 0, 0] = matrix[:, 1, 1] = scale * np.cos(angle)
        matrix[:, 0, 1], matrix[:, 1, 0] = -scale * np.sin(angle), scale * np.sin(angle)
        matrix[:, :, 2] = draw[:, 2:] * 2 * c.shift / c.pixels
        grid = torch.nn.functional.affine_grid(torch.tensor(matrix).float(), list(images.shape), align_corners=False)
        return torch.nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


def load(config: ImagesConfig) -> tuple[Pictures, Pictures]:
    """(to train on, held out). Raises ValueError naming the file or folder that is missing or malformed."""
    if config.source == "fashion-mnist":
        return _in_memory(*_fashion(config, "train"), config), _in_memory(*_fashion(config, "test"), config)
    if config.source == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        pictures = _in_memory(np.round(found.images * 255 / 16), found.target, config)
    else:
        pictures = _folder(config)
    order = stream("held_out_images", config.data_seed).permutation(len(pictures))
    if len(order) <= config.test_size:
        raise ValueError(f"test_size: {config.test_size} of {len(order)} images leave none to train on")
    return pictures.part(order[config.test_size :]), pictures.part(order[: config.test_size])


def _in_memory(images: np.ndarray, labels: np.ndarray, config: ImagesConfig) -> Pictures:
    """images: [N, H, W] of 0 .. 255, framed in black where that reaches `pixels`, else scaled."""
    import torch

    frame, rest = divmod(config.pixels - images.shape[1], 2)

    def batch(index: np.ndarray) -> Tensor:
        found = torch.from_numpy(images[index].astype(np.float32))[:, None] / 127.5 - 1
        if not rest and 0 <= frame <= 2:
            return torch.nn.functional.pad(found, (frame,) * 4, value=-1.0)
        return torch.nn.functional.interpolate(found, size=config.pixels, mode="bilinear", align_corners=False)

    return Pictures(labels.astype(np.int64), batch)


def _fashion(config: ImagesConfig, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 28, 28], labels [N]) from idx files in `folder`, or from the hub."""
    if config.folder:
        stem = Path(config.folder) / FASHION[split]
        return read_idx(Path(f"{stem}-images-idx3-ubyte.gz")), read_idx(Path(f"{stem}-labels-idx1-ubyte.gz"))
    from datasets import load_dataset

    from mutor.models.hub import newest_revision

    name = "zalando-datasets/fashion_mnist"
    try:
        rows: Any = load_dataset(name, split=split, revision=newest_revision("dataset", name))
    except Exception as error:  # the hub raises errors of many kinds
        raise ValueError(
            f"{name} can't be had from the hub ({str(error).splitlines()[0]}); set `folder` to one with its idx files "
            "(train-images-idx3-ubyte.gz, ...)"
        ) from error
    return np.stack([np.asarray(image) for image in rows["image"]]), np.array(rows["label"])


def read_idx(file: Path) -> np.ndarray:
    """A file of unsigned bytes in the idx format, packed or not."""
    try:
        with open(file, "rb") as handle:
            content = handle.read()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError) as error:
        raise ValueError(f"{file}: can't be read: {error}") from None
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file}: starts with {content[:3]!r}, not an idx file of bytes")
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{file}: holds {values.size} bytes, its header says {tuple(shape.tolist())}")
    return values.reshape(shape)


def _folder(config: ImagesConfig) -> Pictures:
    """A folder with one folder a class, in the order of their names."""
    root = Path(config.folder or "")
    classes = sorted(f for f in root.iterdir() if f.is_dir()) if root.is_dir() else []
    if len(classes) != config.classes:
        raise ValueError(f"folder: {root} holds {len(classes)} folders of classes, expected {config.classes}")
    files, labels = [], []
    for number, folder in enumerate(classes):
        found = sorted(f for f in folder.iterdir() if f.suffix.lower() in ENDINGS)
        if not found:
            raise ValueError(f"folder: {folder} holds no images ({', '.join(ENDINGS)})")
        files += found
        labels += [number] * len(found)

    def batch(index: np.ndarray) -> Tensor:
        import torch

        return torch.stack([torch.from_numpy(_read(files[i], config.pixels)) for i in index.tolist()])

    return Pictures(np.array(labels), batch)


def _read(file: Path, pixels: int) -> np.ndarray:
    """float32 [3, pixels, pixels] in -1 .. 1: ADM's centre crop, halved while twice too large, then scaled and cut."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{file}: not an image: {error}") from None
    while min(image.size) >= 2 * pixels:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = pixels / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    values = np.asarray(image, dtype=np.float32)
    top, left = (values.shape[0] - pixels) // 2, (values.shape[1] - pixels) // 2
    return values[top : top + pixels, left : left + pixels].transpose(2, 0, 1) / 127.5 - 1
