"""How good generated images are: Frechet distance, Inception score, precision and recall, class accuracy.

features, logits = judge(images)                # a classifier; its Frechet distance is no plain FID, and never named so
scores(real_features, features, logits)         # {"classifier_fid": .., "classifier_score": .., "precision": .., ..}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A small convolutional classifier of images [B, C, H, W], H and W divisible by 4."""

    def __init__(self, classes: int, colours: int, pixels: int, width: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(colours, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (pixels // 4) ** 2, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, width], logits [B, classes])."""
        features = self.body(images)
        return features, self.head(features)

    @torch.no_grad()
    def judge(self, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Features and logits of many images, in batches, on the CPU."""
        device = self.head.weight.device
        parts = [self(part.to(device)) for part in images.split(batch_size)]
        features, logits = zip(*parts, strict=True)
        return torch.cat(features).cpu(), torch.cat(logits).cpu()


def train_classifier(
    model: Classifier,
    pictures: Any,
    *,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Fit the classifier to pictures: their labels, and batches by index."""
    rng = torch.Generator().manual_seed(seed)
    device = model.head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / steps)
    for step in range(steps):
        index = torch.randint(len(pictures), (batch_size,), generator=rng).numpy()
        labels = torch.from_numpy(pictures.labels[index]).to(device)
        loss = F.cross_entropy(model(pictures.batch(index).to(device))[1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            log(f"classifier {step + 1}/{steps}  loss {loss.item():.4f}")
    model.eval()


class Inception:
    """The Inception network of the published FID, through torch-fidelity (which downloads its weights)."""

    def __init__(self, device: str):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(f"features: inception needs torch-fidelity and torchvision: {error}") from error
        self.device = device
        self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"]).to(device).eval()

    @torch.no_grad()
    def judge(self, images: Tensor, batch_size: int = 100) -> tuple[Tensor, Tensor]:
        """Features [N, 2048] and logits [N, 1008] of images in -1 .. 1, [N, 1 or 3, H, W], on the CPU."""
        features, logits = [], []
        for part in images.split(batch_size):
            pixels = ((part + 1) * 127.5).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)
            found = self.network(pixels.to(self.device))
            features.append(found[0].cpu())
            logits.append(found[1].cpu())
        return torch.cat(features), torch.cat(logits)


class _AsIs(nn.Module):
    """What torchmetrics takes for a feature extractor where features are there already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """The features."""
        return features


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """Squared Frechet distance of two normal distributions fitted to features [N, D] and [M, D]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    # not over the processes of a run: all have the same features, and one alone scores at the end
    metric: Any = FrechetInceptionDistance(feature=_AsIs(real.shape[1]), sync_on_compute=False).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return float(metric.compute())


def distance_to(file: str, made: Tensor) -> float:
    """Squared Frechet distance of features [M, D] from the statistics (mu, sigma) in ADM's reference file."""
    import numpy as np
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        with np.load(file) as found:
            mean, covariance = (torch.from_numpy(found[name]).double() for name in ("mu", "sigma"))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"reference: {file} is no file of statistics with mu and sigma: {error}") from None
    if mean.shape != made.shape[1:]:
        raise ValueError(f"reference: {file} is of {len(mean)} features, expected {made.shape[1]}")
    metric: Any = FrechetInceptionDistance(feature=_AsIs(len(mean)), sync_on_compute=False).set_dtype(torch.float64)
    metric.update(made.double(), real=False)
    count = 1000  # any: it cancels
    metric.real_features_sum = count * mean
    metric.real_features_cov_sum = (count - 1) * covariance + count * torch.outer(mean, mean)
    metric.real_features_num_samples = torch.tensor(count)
    return float(metric.compute())


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """exp of the mean divergence of p(class | image) from p(class), a mean over `splits` parts; logits [N, C]."""
    probability = logits.double().softmax(1)
    values = []
    for part in probability.chunk(splits):
        marginal = part.mean(0, keepdim=True)
        values.append(float((part * (part.clamp_min(1e-30) / marginal).log()).sum(1).mean().exp()))
    return sum(values) / len(values)


def precision_recall(real: Tensor, made: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares of made images within reach of real ones, and of real within reach of made ones (arXiv 1904.06991).

    real [N, D], made [M, D] features; within reach: nearer to some image of the other set than that one's
    `neighbours`-th neighbour of its own set.
    """

    def within(points: Tensor, others: Tensor) -> float:
        reach = torch.cdist(others, others).kthvalue(neighbours + 1, dim=1).values  # the first is itself
        return float((torch.cdist(points, others) <= reach).any(1).double().mean())

    real, made = real.double(), made.double()
    return within(made, real), within(real, made)
