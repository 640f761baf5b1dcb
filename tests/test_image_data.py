"""Images: codes of data sets, how they are drawn, and what scores them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_images import SMALL

from mutor.checks import from_mapping
from mutor.models.llamagen import LlamaGenConfig, LlamaGenForCausalLM
from mutor.mtp.method import Context
from mutor.registry import METHODS, load

TINY = {
    "pixels": 8, "test_size": 100, "copies": 2, "codes": 16, "code_width": 4, "tokenizer_steps": 30,
    "classifier_steps": 60, "valid_samples": 20, "test_samples": 50,
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The task with its tokenizer, classifier and codes, hastily trained."""
    for needed in ("sklearn", "diffusers", "torchmetrics"):
        pytest.importorskip(needed)
    from mutor.tasks.images import Images
    from mutor.tasks.pictures import ImagesConfig

    said = []
    task = Images(from_mapping(ImagesConfig, TINY, "images"))
    task.prepare_assets(tmp_path_factory.getbasetemp() / "assets", "cpu", said.append)
    assert any("held-out images" in line for line in said)
    return task


def test_codes_are_stored_once_and_read_again(digits, tmp_path_factory):
    from mutor.models import vq
    from mutor.tasks.images import Images
    from mutor.tasks.pictures import load as pictures

    again, said = Images(digits.config), []
    again.prepare_assets(tmp_path_factory.getbasetemp() / "assets", "cpu", said.append)
    assert said == [] and again.data_hash() == digits.data_hash()
    train, test = pictures(digits.config)
    assert len(train) + len(test) == 1797 and len(test) == 100
    assert digits.assets.codes["train"].shape == (2 * 1697, 16) and digits.assets.codes["train"].dtype == np.uint8
    ids, prefix = digits.train(0).examples(np.array([3]))[0]
    assert prefix == 1 and ids[0] == 16 + int(train.labels[3])
    assert ids[1:].tolist() == digits.assets.codes["train"][3].tolist() and digits.train(0).size == 2 * 1697
    codes = vq.encode(again.assets.book, train.batch(np.arange(250))).flatten(1)
    assert torch.equal(codes, torch.tensor(digits.assets.codes["train"][:250]).long())


def test_versions_keep_their_class():
    """A classifier of the images as they are knows the versions too; each is another image, and drawn alone."""
    pytest.importorskip("sklearn")
    from mutor.tasks.image_scores import Classifier, train_classifier
    from mutor.tasks.pictures import ImagesConfig, Versions
    from mutor.tasks.pictures import load as pictures

    config = ImagesConfig(copies=3)
    train, _ = pictures(config)
    torch.manual_seed(0)
    judge = Classifier(10, 1, 16)
    train_classifier(judge, train, steps=250, batch_size=64, rate=3e-3, seed=0, log=lambda line: None)
    plain, versions = train.batch(np.arange(len(train))), Versions(train, config)
    assert len(versions) == 3 * len(train) and torch.equal(versions.batch(np.arange(5)), plain[:5])
    for number in (1, 2):
        index = np.arange(len(train)) + number * len(train)
        version = versions.batch(index)
        assert version.min() >= -1.01 and version.max() <= 1.01 and (version - plain).abs().mean() > 0.02
        right = judge.judge(version)[1].argmax(1).numpy() == versions.labels[index]
        assert right.mean() > 0.9 and (versions.labels[index] == train.labels).all()
        assert torch.allclose(versions.batch(index[[7, 3]]), version[[7, 3]], atol=1e-6)


def test_every_second_version_is_mirrored_where_asked():
    pytest.importorskip("sklearn")
    from mutor.tasks.pictures import ImagesConfig, Versions
    from mutor.tasks.pictures import load as pictures

    config = ImagesConfig(copies=2, flip=True, shift=0, turn=0, zoom=0)  # the protocol's two crops an image
    train, _ = pictures(config)
    both = Versions(train, config)
    assert torch.equal(both.batch(np.arange(4) + len(train)), train.batch(np.arange(4)).flip(-1))


def test_a_folder_of_files(tmp_path):
    """ADM's centre crop: a wide picture of three stripes leaves the middle one."""
    image = pytest.importorskip("PIL.Image")
    from mutor.tasks.pictures import ImagesConfig
    from mutor.tasks.pictures import load as pictures

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            wide = np.zeros((40, 120, 3), np.uint8)
            wide[:, 40:80, 1] = 255 if name == "cat" else 10 * number
            image.fromarray(wide).save(tmp_path / name / f"{number}.png")
    config = ImagesConfig(source="folder", folder=str(tmp_path), classes=2, pixels=16, test_size=10)
    train, test = pictures(config)
    assert (len(train), len(test)) == (2, 10) and set(np.concatenate([train.labels, test.labels])) == {0, 1}
    shown = test.batch(np.flatnonzero(test.labels == 0))
    assert shown.shape[1:] == (3, 16, 16)
    assert (shown[:, 0] == -1).all() and (shown[:, 1, :, 1:-1] > 0.9).all()
    with pytest.raises(ValueError, match="holds 2 folders of classes, expected 10"):
        pictures(ImagesConfig(source="folder", folder=str(tmp_path)))
    (tmp_path / "dog/3.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"3\.png: not an image"):
        both = [*pictures(config)]
        [p.batch(np.arange(len(p))) for p in both]
    with pytest.raises(ValueError, match="leave none to train on"):
        pictures(ImagesConfig(source="folder", folder=str(tmp_path), classes=2, test_size=12))
    with pytest.raises(ValueError, match="folder: missing"):
        ImagesConfig(source="folder")


def test_fashion_mnist_files(tmp_path):
    """idx files as they are published: big-endian sizes, then bytes, packed."""
    import gzip

    from mutor.tasks.pictures import ImagesConfig
    from mutor.tasks.pictures import load as pictures

    def write(name, array):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
        (tmp_path / name).write_bytes(gzip.compress(head + array.tobytes()))

    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(12, 28, 28), dtype=np.uint8)
    for stem in ("train", "t10k"):
        write(f"{stem}-images-idx3-ubyte.gz", images)
        write(f"{stem}-labels-idx1-ubyte.gz", np.arange(12, dtype=np.uint8) % 10)
    config = ImagesConfig(source="fashion-mnist", folder=str(tmp_path), pixels=32)
    train, test = pictures(config)
    assert (len(train), len(test)) == (12, 12) and train.labels[11] == 1
    shown = train.batch(np.array([3]))[0, 0]
    assert shown.shape == (32, 32) and (shown[:2] == -1).all() and (shown[:, -2:] == -1).all()  # framed, not blurred
    assert torch.allclose((shown[2:30, 2:30] + 1) * 127.5, torch.tensor(images[3]).float(), atol=1e-3)
    content = gzip.decompress((tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"t10k-images.*holds 9403 bytes, its header says \(12, 28, 28\)"):
        pictures(config)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: can't be read"):
        pictures(config)


def test_real_images_score_as_such_and_noise_does_not(digits, monkeypatch, tmp_path):
    from mutor.tasks.pictures import load as pictures

    train, _ = pictures(digits.config)
    method, model = attached_to(digits)
    of_class = [iter(np.flatnonzero(train.labels == n)) for n in range(10)]
    picked, scores = np.array([next(of_class[n]) for n in digits.classes("test")]), {}
    for kind, images in (("real", train.batch(picked)), ("noise", torch.rand(50, 1, 8, 8) * 2 - 1)):
        monkeypatch.setattr(digits, "draw", lambda *args, shown=images: shown)
        file = tmp_path / f"predictions-{kind}.jsonl"
        scores[kind], right = digits.evaluate(model, method, Context(), "test", 50, file)
        assert scores[kind]["class_accuracy"] == 100 * right["class_accuracy"].mean()
    real, noise = scores["real"], scores["noise"]
    assert real["class_accuracy"] > noise["class_accuracy"] + 20 and real["classifier_fid"] < noise["classifier_fid"]
    assert real["precision"] > 0.9 > noise["precision"]
    assert real["loss"] == noise["loss"] == pytest.approx(np.log(16), abs=0.01)  # an output layer of zeros
    assert real["log_likelihood"] == -real["loss"] and "fid" not in real and "inception_score" not in real


def test_log_likelihood_is_that_of_the_codes_one_by_one(digits, monkeypatch):
    """In nats a code, of held-out images, by the model's plain forward pass; a model that knows more has more."""
    method, model = attached_to(digits)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.1)
    monkeypatch.setattr(digits, "draw", lambda *args: torch.zeros(50, 1, 8, 8))
    metrics, _ = digits.evaluate(model, method, Context(), "test", 7)  # whatever the batches
    ids = torch.tensor(np.array([ids for ids, _ in digits.examples("test")]))
    with torch.no_grad():
        told = model(input_ids=ids).logits[:, :-1, : digits.config.codes].log_softmax(-1)
    by_hand = told.gather(2, ids[:, 1:, None]).mean()
    assert metrics["log_likelihood"] == pytest.approx(float(by_hand), abs=1e-4) and by_hand < -np.log(16)


def test_classes_are_drawn_at_random_and_for_all_models_the_same(digits, monkeypatch):
    """As LlamaGen's sampling does, not all in turn: counts spread like those of independent draws."""
    from mutor.tasks.images import Images

    method, model = attached_to(digits)
    asked = []

    def drawn(model, method, labels, *more):
        asked.append(labels.numpy())
        return torch.zeros(len(labels), 1, 8, 8)

    for seed in (0, 0, 1):
        task = Images(replace(digits.config, sample_seed=seed, test_samples=1000))
        task.assets = digits.assets
        monkeypatch.setattr(task, "draw", drawn)
        task.evaluate(model, method, Context(), "test", 50)
    assert (asked[0] == asked[1]).all() and (asked[0] != asked[2]).any()
    for classes in asked:
        counts = np.bincount(classes, minlength=10)
        assert 1 < ((counts - 100) ** 2 / 100).sum() < 28 and len(counts) == 10  # chi-squared, 9 degrees of freedom
        assert 0.05 < (np.diff(classes) % 10 == 1).mean() < 0.15


def test_a_column_of_the_grid_is_a_class(tmp_path):
    from PIL import Image

    from mutor.tasks.images import save_grid

    labels = torch.tensor([2, 0, 2, 2, 14])
    images = torch.tensor([0.2, -0.6, 0.4, 0.6, 1.0]).view(5, 1, 1, 1).expand(-1, 1, 2, 2)
    save_grid(images, labels, tmp_path / "grid.png", shown=3)
    found = np.asarray(Image.open(tmp_path / "grid.png"))[4::12, 4::12]  # a pixel of each image of 2 + 2, three times
    shown = [[-0.6, 0.0, 0.2], [0.0, 0.0, 0.4], [0.0, 0.0, 0.6]]  # gray where there is none
    assert found.tolist() == ((np.array(shown) + 1) * 127.5).round().astype(int).tolist()


def attached_to(task):
    kind = load(METHODS, "next_token", "method")
    side = task.config.side
    shape = {**SMALL, "codes": 16, "classes": 10, "rows": side, "columns": side}
    model = LlamaGenForCausalLM(LlamaGenConfig(**shape)).eval()
    task.prepare(model)
    with pytest.raises(ValueError, match="model config: codes: 40, allowed for these images: 16"):
        task.prepare(LlamaGenForCausalLM(LlamaGenConfig(**SMALL)))
    return kind(None), model


def test_the_method_is_asked_for_the_codes(digits):
    """One that answers with the number of the class; a row without a class stands behind each with one."""
    from mutor.models import vq

    plain, model = attached_to(digits)

    class Flat(type(plain)):
        def answer(self, model, prompts):
            assert prompts.ids[:, 0].tolist() == [16, 17, 18, 26, 26, 26] and prompts.length == 16
            return (prompts.ids - 16).expand(-1, 16).clamp(max=15)

    drawn = digits.draw(model, Flat(None), torch.arange(3), 4)
    codes = torch.arange(3).view(3, 1, 1).expand(3, 4, 4)
    assert torch.equal(drawn, vq.decode(digits.assets.book, codes))


def test_drawing_is_the_same_twice(digits):
    method, model = attached_to(digits)
    labels = torch.arange(6)
    drawn = digits.draw(model, method, labels, 4)
    assert torch.equal(drawn, digits.draw(model, method, labels, 4)) and drawn.shape == (6, 1, 8, 8)


def test_another_sample_seed_draws_other_images(digits):
    """Also where batches come in another order: no batch of one seed is a batch of the next."""
    from mutor.tasks.images import Images

    method, model = attached_to(digits)
    other = Images(replace(digits.config, sample_seed=1))
    other.assets = digits.assets
    assert len({task.test_data_hash() for task in (digits, other)}) == 2
    ours, theirs = (task.draw(model, method, torch.zeros(12).long(), 4) for task in (digits, other))
    for batch in ours.split(4):
        assert not any(torch.equal(batch, one) for one in theirs.split(4))


def test_half_of_the_held_out_images_choose_and_the_other_half_scores(digits):
    halves = [[tuple(ids) for ids, _ in digits.examples(split)] for split in ("valid", "test")]
    assert [len(half) for half in halves] == [50, 50]
    assert sorted(halves[0] + halves[1]) == sorted(tuple(ids) for ids, _ in digits._encoded("test", np.arange(100)))
