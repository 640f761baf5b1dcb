"""Processes that die at a bad moment and what they leave: named, and never part of a result without a word."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_run import ROOT, smoke_spec, timeless

from mutor.cli import main
from mutor.config.load import load_scale
from mutor.config.runs import make_spec
from mutor.files import MANIFEST, complete_folder, damage, locked, remove_folder, seal
from mutor.results import provenance, records
from mutor.tasks.star_graph import StarGraph
from mutor.training import seed as seed_module
from mutor.training.run import RunEnvironment, run
from mutor.training.trainer import MethodTrainer, last_checkpoint


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def kill(monkeypatch, where, name, when=lambda *args, **kwargs: True):
    """From now on calling `name` of `where` ends the process, if `when` says so."""
    real = getattr(where, name)

    def killed(*args, **kwargs):
        if when(*args, **kwargs):
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, killed)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def spec():
    return smoke_spec("next_token", save_every=4, eval_every=4, log_every=4)


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    """A run that nothing happened to: its folder of runs, and its record."""
    runs = tmp_path_factory.mktemp("whole")
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    return runs, json.loads((records.seed_folder(runs, spec, 7) / "metrics.json").read_text())


@pytest.fixture(scope="module")
def in_training(spec, tmp_path_factory):
    """The folder of runs of a process killed at step 16 of 20, before it saved that step."""
    runs = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        kill(
            patch, MethodTrainer, "_save_checkpoint", lambda self, *_: self.steps == 20 and self.state.global_step == 16
        )
        with pytest.raises(Killed):
            run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    return runs


def copied(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def finished_like(runs, spec, record):
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    folder = records.seed_folder(runs, spec, 7)
    ours = json.loads((folder / "metrics.json").read_text())
    assert timeless(ours) == timeless(record)
    assert records.models(folder) == [p for p in records.models(folder) if p.name in ("last", "best")]
    assert not [p for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    return ours


@pytest.mark.parametrize("harm", [Path.unlink, cut, flip], ids=["missing", "cut", "flipped"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", MANIFEST])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(spec, whole, in_training, tmp_path, capsys, name, harm):
    runs = copied(in_training, tmp_path)
    checkpoints = records.seed_folder(runs, spec, 7) / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["checkpoint-12", "checkpoint-8"]
    harm(checkpoints / "checkpoint-12" / name)
    said = []
    assert last_checkpoint(checkpoints, whole[1]["data_hash"], said.append).name == "checkpoint-8"
    (line,) = said
    assert line.startswith("checkpoint-12 is not used: ") and (name in line or (name, harm) == (MANIFEST, flip))
    if name == "optimizer.pt":  # whatever is wrong, the run goes on in the same way
        assert finished_like(runs, spec, whole[1])["resumed"] is True
        assert "resumed from step 8" in capsys.readouterr().out


def test_without_a_whole_checkpoint_the_run_starts_again(spec, whole, in_training, tmp_path, capsys):
    runs = copied(in_training, tmp_path)
    for name in ("checkpoint-8", "checkpoint-12"):
        cut(records.seed_folder(runs, spec, 7) / "checkpoints" / name / "optimizer.pt")
    assert finished_like(runs, spec, whole[1])["resumed"] is False
    assert capsys.readouterr().out.count("is not used: optimizer.pt has") == 2


def test_run_does_not_go_on_with_other_data(spec, whole, in_training, tmp_path, monkeypatch, capsys):
    """A file of data that was edited after a kill: neither its checkpoints nor its model are of these data."""
    runs = copied(in_training, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(StarGraph, "data_hash", lambda self: "0")
        kill(patch, seed_module.SeedRun, "score", lambda self, _: self.spec == spec)
        with pytest.raises(Killed):
            run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    assert capsys.readouterr().out.count(f"was trained on other data (hash {whole[1]['data_hash']}, now 0)") == 2
    assert finished_like(runs, spec, whole[1])["resumed"] is False
    assert "last/ was trained on other data (hash 0, now " in capsys.readouterr().out


def test_run_that_goes_on_under_other_code_says_so_and_is_stale(spec, in_training, tmp_path, monkeypatch):
    runs, real = copied(in_training, tmp_path), provenance.made_by

    def other(root, config):
        made = real(root, config)
        return {**made, "git_commit": "f" * 40, "code": {**made["code"], "StarGraph": "0"}}

    with monkeypatch.context() as patch:
        patch.setattr(provenance, "made_by", other)
        run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    record = records.read(records.seed_folder(runs, spec, 7) / "metrics.json")
    (later,) = record["also_made_by"]
    assert (later["from"], later["git_commit"], later["code"]["StarGraph"]) == ("step 12", "f" * 40, "0")
    assert record["code"] == real(ROOT, spec.as_dict())["code"]  # what began it
    assert provenance.changed_code(record, ROOT) == ["StarGraph"]


def test_code_that_changed_between_training_and_scoring_is_recorded(spec, tmp_path, monkeypatch):
    real = provenance.made_by
    with monkeypatch.context() as patch:
        kill(patch, seed_module.SeedRun, "score", lambda self, _: self.spec == spec)
        patch.setattr(provenance, "made_by", lambda *_: {**real(*_), "code": {"StarGraph": "0"}})
        with pytest.raises(Killed):
            run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
    record = records.read(records.seed_folder(tmp_path, spec, 7) / "metrics.json")
    assert record["code"] == {"StarGraph": "0"} and [made["from"] for made in record["also_made_by"]] == ["scoring"]
    assert "StarGraph" in provenance.changed_code(record, ROOT)


@pytest.mark.parametrize("name", ["model.safetensors", "training.json", "config.json"])
@pytest.mark.parametrize("part", ["last", "best"])
def test_models_damaged_before_they_are_scored_are_trained_again(spec, whole, tmp_path, capsys, part, name):
    runs = copied(whole[0], tmp_path)
    folder = records.seed_folder(runs, spec, 7)
    if not (folder / part).exists():  # the last one is the best
        shutil.copytree(folder / "last", folder / part)
    (folder / "metrics.json").unlink()
    flip(folder / part / name)
    finished_like(runs, spec, whole[1])
    assert f"{part}/ is damaged: {name} is not as it was written; the run starts again" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"version": 1'])
def test_damaged_record_is_named_when_it_is_made_again(spec, whole, tmp_path, capsys, content):
    runs = copied(whole[0], tmp_path)
    (records.seed_folder(runs, spec, 7) / "metrics.json").write_bytes(content)
    finished_like(runs, spec, whole[1])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "it is made again" in line]
    assert "seed7/metrics.json: " in line


def test_half_written_index_of_a_killed_run_does_not_stay(spec, whole, tmp_path, monkeypatch):
    runs = copied(whole[0], tmp_path)
    home = runs / spec.path
    (home / "index.json").unlink()
    with monkeypatch.context() as patch:
        kill(patch, os, "replace", lambda source, target: target == home / "index.json")
        with pytest.raises(Killed):
            run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    assert len(list(home.glob(".index.json.*"))) == 1
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    assert sorted(p.name for p in home.iterdir()) == [".lock", "index.json", "seed7"]


def test_what_is_set_aside_for_another_configuration_is_named(spec, whole, in_training, tmp_path, capsys):
    runs = copied(in_training, tmp_path)
    flip(records.seed_folder(runs, spec, 7) / "config_hash")
    assert finished_like(runs, spec, whole[1])["resumed"] is False
    assert "config_hash names another configuration; what was made under it is set aside" in capsys.readouterr().out
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path / "new"))
    assert "set aside" not in capsys.readouterr().out


def test_kill_while_stale_run_is_set_aside_leaves_no_old_model_to_score(spec, whole, tmp_path, monkeypatch):
    runs = copied(whole[0], tmp_path)
    folder = records.seed_folder(runs, spec, 7)
    monkeypatch.setattr(provenance, "changed_code", lambda record, root: ["StarGraph"])
    environment = RunEnvironment(root=ROOT, runs=runs, rerun_stale=True)
    with monkeypatch.context() as patch:
        kill(patch, Path, "rename", lambda self, target: "superseded" in str(target))
        with pytest.raises(Killed):
            run(spec, spec.seeds, environment)
    assert not (folder / "last").exists() and records.finished(runs, spec, 7)
    with monkeypatch.context() as patch:
        kill(patch, seed_module.SeedRun, "train", lambda self: self.spec == spec)
        with pytest.raises(Killed):  # it trains
            run(spec, spec.seeds, environment)
    assert (folder / "metrics.superseded-1.json").exists()


@pytest.mark.parametrize("order", range(3))
def test_kill_while_models_are_deleted_never_passes_for_a_run_without_best(spec, whole, tmp_path, monkeypatch, order):
    """The last of a run's models goes first: a last/ without its best/ would count as one whose last is the best."""
    runs = copied(whole[0], tmp_path)
    folder = records.seed_folder(runs, spec, 7)
    (folder / "metrics.json").unlink()
    shutil.copytree(folder / "last", folder / "step4")
    if not (folder / "best").exists():
        shutil.copytree(folder / "last", folder / "best")
    for part in records.models(folder)[:order]:
        remove_folder(part)
    assert (folder / "last").exists() is (order == 0)


def test_base_model_that_is_not_its_records_is_trained_again(spec, whole, tmp_path, capsys):
    spec = smoke_spec("mutor")
    runs = tmp_path / "runs"
    run(spec.base, (7,), RunEnvironment(root=ROOT, runs=runs))
    base = records.seed_folder(runs, spec.base, 7)
    before = records.weights_hash(base / "last")
    file = base / "last/model.safetensors"
    flip(file)
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    assert "last: model.safetensors is not as it was written; it is trained again" in capsys.readouterr().out
    assert records.weights_hash(base / "last") == before
    record = records.read(records.seed_folder(runs, spec, 7) / "metrics.json")
    assert record["base_weights_hash"] == before == records.read(base / "metrics.json")["weights_hash"]
    # another model, whole in itself, in the place of the base
    flip(file)
    seal(base / "last")
    remove_folder(records.seed_folder(runs, spec, 7))
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    assert "its weights are not those of its record; it is trained again" in capsys.readouterr().out


def test_cleanup_leaves_what_is_being_run_and_removes_what_the_dead_left(whole, spec, tmp_path, capsys):
    runs = copied(whole[0], tmp_path)
    folder = records.seed_folder(runs, spec, 7)
    (folder / ".last.removed").mkdir()
    (folder / ".metrics.json.1.tmp.json").touch()
    with locked(folder / ".lock"):
        assert main(["cleanup", "--scale", "smoke", "--runs", str(runs)]) == 0
    assert "seed7 is being run: left as it is" in capsys.readouterr().out and (folder / "last").exists()
    assert main(["cleanup", "--scale", "smoke", "--runs", str(runs)]) == 0
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith("pred")) == [
        ".lock", "config_hash", "metrics.json",
    ]  # fmt: skip


def test_sealed_folder_names_its_first_damage(tmp_path):
    with complete_folder(tmp_path / "model") as part:
        (part / "inside").mkdir()
        (part / "inside/weights").write_bytes(bytes(range(100)))
        (part / "empty").touch()
    folder = tmp_path / "model"
    assert damage(folder) is None and [p.name for p in tmp_path.iterdir()] == ["model"]
    flip(folder / "inside/weights")
    assert damage(folder) == "inside/weights is not as it was written"
    cut(folder / "inside/weights")
    assert damage(folder) == "inside/weights has 50 bytes of 100"
    (folder / "inside/weights").unlink()
    assert damage(folder) == "inside/weights is missing"
    for text in ("", "[1]", '{"empty": 3}', '{"empty": {}}', "\xff"):
        (folder / MANIFEST).write_bytes(text.encode("latin-1"))
        assert damage(folder) == "manifest.json can't be read"
    (folder / MANIFEST).unlink()
    assert damage(folder) == "manifest.json is missing"


def test_damaged_images_codes_are_made_again(tmp_path, capsys):
    from mutor.tasks.image_assets import ImageAssets

    pytest.importorskip("diffusers")
    scale = load_scale(ROOT, "smoke")
    name = next(name for name, data in scale.datasets.items() if data.task == "images")
    model = next(name for name in scale.models if "llamagen" in name)
    config = make_spec(scale, name, model, "next_token", {}, (7,)).task_config
    first = ImageAssets.made_once(config, tmp_path, "cpu", print).data_hash()
    (home,) = (p for p in tmp_path.iterdir() if p.is_dir())
    flip(home / "train.npy")
    again = ImageAssets.made_once(config, tmp_path, "cpu", print)
    assert f"{home} is damaged: train.npy is not as it was written; it is made again" in capsys.readouterr().out
    assert again.data_hash() == first
