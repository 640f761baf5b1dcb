"""Which problems choose a checkpoint, and which score it: never the same ones, but where the paper did so."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mutor.config.load import load_scale, load_table
from mutor.config.runs import make_spec
from mutor.files import write_json
from mutor.results import records
from mutor.results.cells import Evidence
from mutor.results.render import caption, latex, markdown
from mutor.tasks.corpora import CORPORA, Origin, problems
from mutor.tasks.star_graph import StarGraph, StarGraphConfig
from mutor.tasks.task import Task
from mutor.tasks.text import Text, TextConfig
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent
GENERATED = Origin("generated")


def spied(monkeypatch, task, values):
    """Let a task's evaluation say what a list has for a split, one value a call; returns the splits asked for."""
    plain, asked = task.evaluate, []

    def evaluate(self, model, method, context, split, *more):
        metrics, scores = plain(self, model, method, context, split, *more)
        asked.append(split)
        metrics[self.selection_metric] = values[split][asked.count(split) - 1]
        del scores[self.selection_metric]  # of problems, which would contradict it
        return metrics, scores

    monkeypatch.setattr(task, "evaluate", evaluate)
    return asked


def test_validation_chooses_and_the_test_split_scores(tmp_path, monkeypatch):
    """On validation the model gets worse from step to step, on test better: best/ is the first, whatever test says."""
    asked = spied(monkeypatch, StarGraph, {"valid": [30.0, 20.0, 10.0], "test": [1.0, 2.0, 3.0, 4.0, 5.0]})
    scale = load_scale(ROOT, "smoke")
    spec = make_spec(scale, "g2x3", "gpt2-2x32", "next_token", {}, (7,))
    spec = replace(spec, base=None, recipe=replace(spec.recipe, steps=6, eval_every=2, save_every=5))
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
    assert asked == ["valid"] * 3 + ["test"] * 2
    folder = records.seed_folder(tmp_path, spec, 7)
    assert json.loads((folder / "best/training.json").read_text()) == {"step": 2, "solve_rate": 30.0}
    record = records.read(folder / "metrics.json")
    assert [e["eval_solve_rate"] for e in record["curve"] if "eval_solve_rate" in e] == [30.0, 20.0, 10.0]
    found = [(c["names"], c["step"], c["metrics"]["solve_rate"]) for c in record["checkpoints"]]
    assert found == [(["best"], 2, 1.0), (["last"], 6, 2.0)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def published(folder):
    """Folders with two rows a split, in the published formats; what is asked for names the split."""
    for split, aqua, samsum, dialogsum in (
        ("train", "train.json", "train.json", "dialogsum.train.jsonl"),
        ("valid", "dev.json", "val.json", "dialogsum.dev.jsonl"),
        ("test", "test.json", "test.json", "dialogsum.test.jsonl"),
    ):
        asked = [f"{split} {number}" for number in range(2)]
        options = [f"{letter}){number}" for number, letter in enumerate("ABCDE")]
        for name, file, rows in (
            (
                "aqua",
                aqua,
                [{"question": q, "options": options, "rationale": "As C is.", "correct": "C"} for q in asked],
            ),
            ("samsum", samsum, [{"id": q, "dialogue": q, "summary": f"Of {q}."} for q in asked]),
            ("dialogsum", dialogsum, [{"fname": q, "dialogue": q, "summary": f"Of {q}.", "topic": "t"} for q in asked]),
            ("gsm8k", f"{split}.jsonl", [{"question": q, "answer": "1 + 1 = 2\n#### 2"} for q in asked]),
            ("math500", f"{split}.jsonl", [{"problem": q, "solution": "$2$", "answer": "2"} for q in asked]),
        ):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / file).write_text(lines(rows))


@pytest.mark.parametrize(
    ("name", "chosen_on"),
    [("aqua-rat", "valid"), ("samsum", "valid"), ("dialogsum", "valid")]
    + [(name, "test") for name in ("gsm8k", "1m-gsm", "2m-gsm", "1m-gsm-extra", "1m-math")],
)
def test_published_data_are_validated_on_their_validation_split(tmp_path, name, chosen_on):
    """The paper validates on AQuA's and the summaries' own; GSM8K and MATH500 have none, not even where a file lies."""
    published(tmp_path)
    found = {split: problems(CORPORA[name], split, Origin("folder", str(tmp_path))) for split in ("valid", "test")}
    assert [f"{chosen_on} {number}" in p.prompt for number, p in enumerate(found["valid"])] == [True, True]
    assert [f"test {number}" in p.prompt for number, p in enumerate(found["test"])] == [True, True]
    task = Text(TextConfig(corpus=name, source="folder", folder=str(tmp_path), tokens="standin"))
    assert task.problems == found and task.chosen_on(task.config) == chosen_on
    assert task.chosen_on(TextConfig(corpus=name)) == chosen_on  # of the hub's, too


@pytest.mark.parametrize("name", [name for name in CORPORA if name not in ("own", "python")])
def test_generated_data_have_a_validation_split(name):
    corpus = CORPORA[name]
    valid, test = ({p.prompt for p in problems(corpus, split, GENERATED)} for split in ("valid", "test"))
    assert len(valid) >= 250 and len(test) >= 250 and not valid & test
    assert Text.chosen_on(TextConfig(corpus=name, source="generated")) == "valid"


def own(tmp_path, **more):
    """The smoke scale with a user's own data, and the run of next-token prediction on them."""
    for number, name in enumerate(("train", "valid", "test")):
        rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(100 * number, 100 * number + 40)]
        (tmp_path / f"{name}.jsonl").write_text(lines(rows))
    files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    options = {"corpus": "own", **files, "tokens": "standin", "new_tokens": 4, "test_size": 5, **more}
    scale = load_scale(ROOT, "smoke")
    scale.recipes["text"] |= {"epochs": 2, "eval_every": 4}
    scale.datasets["mine"] = replace(scale.datasets["gsm8k"], options=options, base=None)
    return scale, make_spec(scale, "mine", "llama-2x32", "next_token", {}, (7,))


def test_own_data_without_validation_choose_nothing(tmp_path, monkeypatch):
    """The test file does not choose in its place: nothing is scored before the end, and the last one is the best."""
    scale, spec = own(tmp_path)
    asked = spied(monkeypatch, Text, {"test": [50.0, 60.0]})
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path / "runs"))
    folder = records.seed_folder(tmp_path / "runs", spec, 7)
    record = records.read(folder / "metrics.json")
    assert asked == ["test"] and [c["names"] for c in record["checkpoints"]] == [["best", "last"]]
    assert record["steps"] == 10 and not (folder / "best").exists()
    assert len(record["curve"]) == 2 and all("loss" in entry for entry in record["curve"])
    scale.recipes["text"]["stop_at"] = 50.0
    with pytest.raises(ValueError, match=r"mine: stop_at: 50\.0 is never reached: nothing is validated"):
        make_spec(scale, "mine", "llama-2x32", "next_token", {})
    with pytest.raises(ValueError, match="valid_size: 9 goes with a valid_file"):
        own(tmp_path, valid_size=9)


def test_own_data_with_validation_choose_by_it(tmp_path, monkeypatch):
    _, spec = own(tmp_path, valid_file=str(tmp_path / "valid.jsonl"), valid_size=3)
    asked = spied(monkeypatch, Text, {"valid": [50.0, 40.0, 30.0], "test": [1.0, 2.0]})
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path / "runs"))
    record = records.read(records.seed_folder(tmp_path / "runs", spec, 7) / "metrics.json")
    assert asked == ["valid"] * 3 + ["test"] * 2
    assert [(c["names"], c["step"]) for c in record["checkpoints"]] == [(["best"], 4), (["last"], 10)]
    task = Text(spec.task_config)
    assert [p.gold for p in task.problems["valid"]] == ["101", "102", "103"]
    assert [p.gold for p in task.problems["test"]][:2] == ["201", "202"]


def test_the_test_problems_have_a_hash_of_their_own(short_corpora):
    """The same for all that is scored on the same problems in the same order, whatever it was trained on."""

    def hashes(**options):
        task = Text(TextConfig(source="generated", tokens="standin", **{"train_size": 50, "test_size": 40, **options}))
        return task.data_hash(), task.test_data_hash()

    found = [hashes(corpus="gsm8k"), hashes(corpus="1m-gsm"), hashes(corpus="1m-gsm-extra", train_size=70)]
    assert len({data for data, _ in found}) == 3 and len({test for _, test in found}) == 1
    others = {hashes(corpus="1m-gsm", test_size=41)[1], hashes(corpus="1m-math")[1], found[0][1]}
    assert len(others) == 3
    graphs = [StarGraphConfig(2, 3, 9, test_size=8, reverse=reverse, valid_size=n) for reverse, n in ((0, 5), (1, 6))]
    one, other = (StarGraph(config) for config in graphs)
    assert one.test_data_hash() == other.test_data_hash() and one.data_hash() != other.data_hash()
    assert StarGraph(replace(graphs[0], data_seed=1)).test_data_hash() != one.test_data_hash()
    assert Task.test_data_hash(one) != Task.test_data_hash(other)  # a task's by default: of its examples


@pytest.mark.parametrize(
    ("name", "scale", "says"),
    [
        ("table1", "laptop", "runs.csv. The best checkpoint is chosen on validation problems."),
        ("table4", "laptop", "The best checkpoint is chosen on validation problems."),
        ("table1", "paper", "chosen on the test problems themselves, as in the paper (gsm8k, 1m-gsm, 2m-gsm, 1m-math); "
         "chosen on validation problems (aqua-rat)."),
        ("table1", "gpu", "The best checkpoint is chosen on the test problems themselves, as in the paper."),
        ("table2", "paper", "The best checkpoint is chosen on validation problems."),
        ("figure4", "paper", ""),
        ("table7", "laptop", ""),
    ],
)  # fmt: skip
def test_a_caption_says_what_chose_the_checkpoint(tmp_path, name, scale, says):
    evidence = Evidence(ROOT, load_scale(ROOT, scale), records.Records(tmp_path))
    table = evidence.table(name)
    words = caption(evidence, table)
    assert words.endswith(says) and load_table(ROOT, name).caption in words
    assert ("best checkpoint is" in words) == bool(says)
    assert words in markdown(evidence, table)
    assert words.rpartition(". ")[2] in latex(evidence, table)


def test_records_say_what_chose_their_checkpoint(tmp_path):
    """Runs of earlier code chose on other problems than runs would now: a caption says what they did."""
    shutil.copytree(ROOT / "results/reference/laptop/runs/laptop/gsm8k", tmp_path / "laptop/gsm8k")
    for file in tmp_path.glob("laptop/gsm8k/gemma-4x128/*/*/seed*/metrics.json"):
        chosen_on = "test" if "next_token" in file.parts else "valid"
        write_json(file, json.loads(file.read_text()) | {"chosen_on": chosen_on})
    evidence = Evidence(ROOT, load_scale(ROOT, "laptop"), records.Records(tmp_path))
    words = caption(evidence, evidence.table("table1"))
    assert (
        "chosen on validation problems (" in words
        and "chosen on the test problems themselves, as in the paper (" in words
    )
