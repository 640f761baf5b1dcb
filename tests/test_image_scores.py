"""Scores of generated images against formulas, known cases, and real data against noise."""

import numpy as np
import pytest
import torch
from scipy import linalg

pytest.importorskip("torchmetrics")

from mutor.tasks.image_scores import (
    Classifier,
    distance_to,
    frechet_distance,
    inception_score,
    precision_recall,
    train_classifier,
)
from mutor.tasks.pictures import Pictures


def test_frechet_distance_against_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)), 1 + rng.normal(size=(400, 6))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)


def test_distance_to_statistics_in_a_file(tmp_path):
    """mu and sigma of the same features give what the features give."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(500, 5)), 0.5 + 2 * rng.normal(size=(300, 5))
    np.savez(tmp_path / "reference.npz", mu=a.mean(0), sigma=np.cov(a, rowvar=False))
    got = distance_to(str(tmp_path / "reference.npz"), torch.tensor(b))
    assert got == pytest.approx(frechet_distance(torch.tensor(a), torch.tensor(b)), rel=1e-6)
    np.savez(tmp_path / "other.npz", mu=a.mean(0))
    with pytest.raises(ValueError, match=r"other\.npz is no file of statistics"):
        distance_to(str(tmp_path / "other.npz"), torch.tensor(b))
    with pytest.raises(ValueError, match="is of 5 features, expected 3"):
        distance_to(str(tmp_path / "reference.npz"), torch.tensor(b[:, :3]))


def test_inception_score_of_known_cases():
    sure = 50.0 * torch.eye(4)[torch.arange(400) % 4]
    assert inception_score(sure) == pytest.approx(4)  # sharp, and all classes alike often
    assert inception_score(sure[:1].expand(400, -1)) == pytest.approx(1)  # one class only
    assert inception_score(torch.zeros(400, 4)) == pytest.approx(1)  # no idea


def test_precision_and_recall_by_hand():
    """Real points on a line at 0 .. 9, reach (third neighbour) 2 or 3; made ones cover the left half only."""
    real = torch.arange(10.0)[:, None]
    made = torch.tensor([[0.5], [1.5], [2.5], [3.5], [50.0]])
    precision, recall = precision_recall(real, made)
    assert precision == 0.8  # all but the one at 50
    assert recall == 1.0  # 50's third neighbour is 48.5 away, so it reaches everything
    precision, recall = precision_recall(real, made[:4])
    assert precision == 1.0 and recall == pytest.approx(0.7)  # reaches 3, 2, 2, 3: from 3.5 up to 6.5, so 0 .. 6
    assert precision_recall(real, real) == (1.0, 1.0)


def test_halves_of_the_same_digits_are_near_and_noise_is_far():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, size=16)
    labels = torch.tensor(digits.target)
    pictures = Pictures(digits.target, lambda index: images[index]).part(np.arange(900))
    torch.manual_seed(0)
    model = Classifier(10, 1, 16)
    train_classifier(model, pictures, steps=150, batch_size=64, rate=3e-3, seed=0, log=print)
    features, logits = model.judge(images)
    assert (logits[900:].argmax(1) == labels[900:]).float().mean() > 0.9
    noise = model.judge(torch.rand(900, 1, 16, 16) * 2 - 1)[0]
    near, far = frechet_distance(features[:900], features[900:]), frechet_distance(features[:900], noise)
    assert near < 0.1 * far
    same, other = precision_recall(features[:900], features[900:]), precision_recall(features[:900], noise)
    assert min(same) > 0.6 and min(other) < 0.05
    assert inception_score(logits) > 7 > 3 > inception_score(model.judge(torch.rand(900, 1, 16, 16) * 2 - 1)[1])
