"""Tables and figures from a fixed set of run records."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mutor import registry
from mutor.config.load import load_scale, load_table
from mutor.config.runs import cells_of, run_cells
from mutor.files import write_json
from mutor.results import record_schema, records
from mutor.results.cells import COLUMNS, Evidence
from mutor.results.drawings import collect_artifact
from mutor.results.published import Published, read_reported
from mutor.results.records import Records
from mutor.results.render import grid, latex_text
from mutor.results.stats import summarise

ROOT = Path(__file__).parent.parent


def evidence(scale, runs):
    """What the runs below a folder say."""
    return Evidence(ROOT, load_scale(ROOT, scale), Records(runs))


def collect(scale, name, runs, folder):
    """All files of an artifact, made into a folder."""
    found = evidence(scale, runs)
    return collect_artifact(found, found.table(name), folder)


def record(spec, seed, solve_rate):
    """A run record as a run writes it, shortened."""
    metrics = {"solve_rate": solve_rate, "first_step_accuracy": solve_rate, "loss": 0.1, "chance": 50.0}
    scores = {"solve_rate": record_schema.pack(np.arange(100) < solve_rate)}
    curve = [{"step": 10, "next_token": 1.0, "register": 1.5, "loss": 1.2}, {"step": 20, "eval_solve_rate": solve_rate}]
    return {
        "version": 1,
        "scale": spec.scale,
        "train_data": spec.data,
        "model": spec.model,
        "method": spec.method,
        "settings": spec.settings,
        "seed": seed,
        "config": spec.as_dict(),
        "config_hash": spec.config_hash,
        "checkpoints": [{"names": ["best", "last"], "step": 20, "metrics": metrics, "scores": scores}],
        "curve": curve,
        "added_parameters": 32,
        "versions": {"torch": "2.13.0"},
        "steps": 20,
        "seconds_training": 1.0,
        "trainable_parameters": 100,
        "test_data_hash": "t",
    }


def test_seeds_on_other_problems_are_not_stacked(tmp_path):
    """Scores of problems stand in one column only where all seeds' records name the same problems."""
    found = {}
    for kind, hashes in (("same", "tt"), ("others", "tu"), ("unnamed", (None, None))):
        cell = next(c for c in run_cells(load_table(ROOT, "table1"), load_scale(ROOT, "smoke")))
        for seed, rate, test_data_hash in zip((42, 43), (48.0, 52.0), hashes, strict=True):
            file = records.seed_folder(tmp_path / kind, cell.spec, seed) / "metrics.json"
            told = record(cell.spec, seed, rate) | {"test_data_hash": test_data_hash}
            scored = {"scores": {"accuracy": told["checkpoints"][0]["scores"]["solve_rate"]}}
            told["checkpoints"] = [told["checkpoints"][0] | scored | {"metrics": {"accuracy": rate}}]
            write_json(file, told)
        evidence_here = evidence("smoke", tmp_path / kind)
        frame = evidence_here.frame(evidence_here.table("table1"))
        found[kind] = frame[frame["mean"].notna()].iloc[0][["ci_low", "ci_high"]].tolist()
    alone = summarise([48.0, 52.0])
    assert found["others"] == found["unnamed"] == pytest.approx([alone.ci_low, alone.ci_high])
    assert found["same"][0] < alone.ci_low and found["same"][1] > alone.ci_high


@pytest.fixture
def built(tmp_path):
    scale, table = load_scale(ROOT, "smoke"), load_table(ROOT, "figure4")
    rates = {"next_token": [48.0, 52.0], "mutor": [100.0, 97.0]}
    for cell in cells_of(table, scale):
        if cell.row.control or cell.spec.method not in rates:
            continue
        for seed, rate in zip((42, 43), rates[cell.spec.method], strict=True):
            file = records.seed_folder(tmp_path / "runs", cell.spec, seed) / "metrics.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record(cell.spec, seed, rate)))
    return tmp_path, collect("smoke", "figure4", tmp_path / "runs", tmp_path / "out")


def test_cells_equal_numbers_worked_by_hand(built):
    frame = pd.read_csv(built[0] / "out/figure4.csv")
    assert list(frame.columns) == [*COLUMNS]
    cells = frame[(frame["metric"] == "solve_rate") & ~frame["train_data"].str.contains("reversed")].set_index("method")
    assert cells.loc["next_token", ["n_seeds", "mean"]].tolist() == [2, 50.0]
    assert cells.loc["next_token", "std"] == pytest.approx(2.828427, abs=1e-5)
    mutor = cells.loc["mutor"]
    mutor = mutor[mutor["n_seeds"] > 0].iloc[0]
    assert (mutor["mean"], mutor["d_max"], mutor["a"], mutor["placement"], mutor["added_params"]) == (
        98.5,
        3,
        0.5,
        "all",
        32,
    )
    assert cells.loc["parallel_mtp", "n_seeds"] == 0 and np.isnan(cells.loc["parallel_mtp", "mean"])


def test_a_metric_that_nothing_measures_is_named(built, tmp_path):
    found = evidence("smoke", built[0] / "runs")
    collect_artifact(found, replace(found.table("figure4"), metrics=("solve_rat",)), tmp_path)
    text = (tmp_path / "figure4.md").read_text()
    assert text.count("seed42/metrics.json: metric: 'solve_rat' is unknown, did you mean 'solve_rate'?") == 2
    assert pd.read_csv(tmp_path / "figure4.csv")["n_seeds"].eq(0).all()


def test_files_equal_the_golden_ones(built):
    for name in ("figure4.csv", "figure4.md", "figure4.tex"):
        golden = ROOT / "tests/golden" / name
        assert (built[0] / "out" / name).read_text() == golden.read_text(), f"{name} differs from tests/golden"


def test_same_records_give_the_same_picture(built, tmp_path):
    folder, files = built
    collect("smoke", "figure4", folder / "runs", tmp_path / "again")
    for file in files:
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    svg = (folder / "out/figure4.svg").read_text()
    assert "parallel_mtp" in svg and "not run" in svg and "chance 1/n" in svg


def test_a_new_drawing_is_one_entry_and_its_functions(built, tmp_path, monkeypatch):
    def draw(evidence, table):
        figure = Figure()
        figure.subplots().plot(evidence.frame(table)["mean"])
        return figure

    monkeypatch.setitem(sys.modules, "own_figures", SimpleNamespace(draw=draw))
    toy = registry.Drawing(figures=(registry.Figure(draw="own_figures:draw", suffix="_means"),))
    monkeypatch.setitem(registry.DRAWINGS, "toy", toy)
    found = evidence("smoke", built[0] / "runs")
    table = replace(found.table("figure4"), draw="toy")
    files = collect_artifact(found, table, tmp_path)
    assert [file.name for file in files] == [f"figure4{ending}" for ending in (".csv", ".md", ".tex", *toy.suffixes)]
    assert toy.suffixes == ["_means.png", "_means.svg"] and all(file.stat().st_size > 500 for file in files)
    with pytest.raises(ValueError, match="draw: 'toi' is unknown, did you mean 'toy'"):
        replace(table, draw="toi")


def test_what_is_to_be_drawn_is_read_without_what_draws_it():
    code = (
        "import sys; from pathlib import Path; from mutor.config import load\n"
        "tables = [load.load_table(Path(), name) for name in load.table_names(Path())]\n"
        "assert any(table.needs_runs for table in tables) and any(table.drawing.suffixes for table in tables)\n"
        "assert not {'torch', 'matplotlib', 'pandas', 'scipy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", registry.DRAWINGS)
def test_functions_of_every_drawing_are_there(name):
    drawing = registry.DRAWINGS[name]
    assert drawing.made_of in ("runs", "costs", "config")
    for target in (drawing.rows, drawing.printed, drawing.about, *(figure.draw for figure in drawing.figures)):
        assert not target or registry.resolve(target).__doc__, target


def test_published_value_is_equal_in_all_that_both_state():
    table = load_table(ROOT, "table4")
    rows = [
        ("gemma-2b", "mutor", "2", "5", "1"), ("gemma-2b", "mutor", "4", "5", "2"),
        ("gemma-2b", "mutor", "4", "10", "3"), ("gemma-2b", "next_token", "", "5", "4"),
        ("llama-3-8b", "mutor", "", "5", "5"),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["role", "method", "d_max", "epochs", "value"]).assign(artifact="table4")
    published = Published(frame, table)

    def beside(model, method, d_max, budget_factor=1.0):
        return published.beside({"role": [model], "method": [method], "d_max": [d_max]}, budget_factor)

    assert beside("gemma-2b", "mutor", "2") == 1 and beside("gemma-2b", "mutor", "4") == 2
    assert beside("gemma-2b", "mutor", "4", budget_factor=2) == 3 and beside("gemma-2b", "mutor", "2", 2) is None
    assert beside("gemma-2b", "mutor", "6") is None and beside("gemma-2b", "next_token", "") == 4
    assert beside("llama-3-8b", "mutor", "2") == 5  # the source states no d_max
    assert beside("llama-3-8b", "next_token", "") is beside("gemma-2b", "lora", "2") is None
    assert published.beside({"role": ["gemma-2b"], "method": ["mutor"]}) == 1  # a cell that states no d_max
    elsewhere = Published(frame.assign(role="decoder-8x384"), table)  # a reference on a model of its own
    assert elsewhere.beside({"role": ["gemma-2b"], "method": ["next_token"], "d_max": [""]}) == 4


def test_nothing_is_subtracted_where_something_stands_in(tmp_path):
    for cell in run_cells(load_table(ROOT, "table1"), load_scale(ROOT, "laptop")):
        told = record(cell.spec, 42, 50.0)
        told["checkpoints"] = [{"names": ["best", "last"], "step": 20, "metrics": {"accuracy": 50.0}, "scores": {}}]
        write_json(records.seed_folder(tmp_path, cell.spec, 42) / "metrics.json", told)
    found = evidence("laptop", tmp_path)
    frame = found.frame(found.table("table1"))
    beside = frame[frame["mean"].notna() & frame["reported"].notna()]
    assert len(beside) >= 20 and beside["stands_in_for"].ne("").all() and beside["reported_difference"].isna().all()


def test_published_values_stand_beside_their_cells(tmp_path):
    collect("gpu", "figure4", tmp_path / "runs", tmp_path / "out")
    frame = pd.read_csv(tmp_path / "out/figure4.csv")
    cells = frame[frame["metric"] == "solve_rate"].set_index(["train_data", "method", "d_max"])["reported"]
    assert cells["star_graph n=3 l=5 labels=30", "parallel_mtp", 4] == 100
    assert cells["star_graph n=3 l=5 labels=30", "parallel_mtp", 2] == 59
    assert cells["star_graph n=5 l=3 labels=30", "sequential_mtp", 2] == 100
    assert cells["star_graph n=2 l=10 labels=100", "parallel_mtp", 9] == 66.2
    rest = frame.groupby(["train_data", "method"])["reported"].first()
    longer = frame[frame["settings"].str.contains("horizon=5", na=False)].groupby("train_data")["reported"].first()
    assert rest["star_graph n=5 l=5 labels=30", "token_order"] == 100
    assert longer["star_graph n=7 l=7 labels=100"] == 94.3
    assert rest["star_graph n=5 l=5 labels=100", "next_token"] == 18.6
    assert (
        frame[(frame["method"] == "next_token") & frame["train_data"].str.contains("n=5 l=5")]["reported"].iloc[0]
        == 0.1
    )
    assert frame["reported_difference"].isna().all() and (frame["n_seeds"] == 0).all()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("solve_rate", 170, "is 170, allowed: 0 to 100"),
        ("solve_rate", float("nan"), "is nan, allowed: 0 to 100"),
        ("solve_rate", 51.0, "is 51.0, but the scores of its problems give "),
    ],
)
def test_broken_record_is_left_out_visibly(built, tmp_path, field, value, says):
    folder, _ = built
    file = next((folder / "runs").glob("**/seed42/metrics.json"))
    content = json.loads(file.read_text())
    content["checkpoints"][0]["metrics"][field] = value
    file.write_text(json.dumps(content))
    found = evidence("smoke", folder / "runs")
    collect_artifact(found, found.table("figure4"), tmp_path / "out")
    text = (tmp_path / "out/figure4.md").read_text()
    name = f"Left out: {file.relative_to(folder / 'runs')}: field 'checkpoints[0].metrics.solve_rate' {says}"
    assert name in text and len(found.runs.problems) == 1
    frame = pd.read_csv(tmp_path / "out/figure4.csv")
    assert sorted(frame.loc[frame["n_seeds"] > 0, "n_seeds"].unique()) == [1, 2]


def test_records_merge_by_copying_and_contradictions_are_reported(built):
    folder, _ = built
    file = next((folder / "runs").glob("**/seed42/metrics.json"))
    setting = file.parent.parent
    other = setting / "seed42-other/metrics.json"
    write_json(other, json.loads(file.read_text()))  # the same run, made again with the same numbers
    path = setting.relative_to(folder / "runs").as_posix()
    same = Records(folder / "runs")
    assert [r["seed"] for r in same.at(path)] == [42, 43] and same.problems == []
    content = json.loads(file.read_text())
    before = content["checkpoints"][0]["metrics"]["solve_rate"]
    content["checkpoints"][0]["metrics"]["solve_rate"] = 1.0
    content["checkpoints"][0]["scores"]["solve_rate"] = record_schema.pack(np.arange(100) < 1)
    write_json(other, content)
    differs = Records(folder / "runs")
    assert records.checkpoint_metrics(differs.at(path)[0], "last")["solve_rate"] == before
    assert (
        len(differs.problems) == 1
        and "contradicts" in differs.problems[0]
        and "solve_rate is 1.0" in differs.problems[0]
    )
    elsewhere = folder / "runs" / path.replace("next_token", "teacherless").replace("mutor", "teacherless") / "seed9"
    write_json(elsewhere / "metrics.json", json.loads(file.read_text()))
    strange = Records(folder / "runs")
    assert strange.at(elsewhere.parent.relative_to(folder / "runs").as_posix()) == []
    assert "in the folder of" in strange.problems[0]
    write_json(setting / "seed44/metrics.json", json.loads(file.read_text()))
    copied = Records(folder / "runs")
    assert [r["seed"] for r in copied.at(path)] == [42, 43]
    assert "seed44/metrics.json: a record of seed 42, in a folder for another" in copied.problems[-1]
    content = json.loads((setting / "seed43/metrics.json").read_text()) | {"data_hash": "0"}
    write_json(setting / "seed43/metrics.json", content)
    mixed = Records(folder / "runs")
    assert [r["seed"] for r in mixed.at(path)] == [42]
    assert any("its data are others (hash 0) than those of seed 42" in text for text in mixed.problems)


def test_reported_values_are_all_there():
    reported = read_reported(ROOT / "config/reported.csv")
    assert len(reported) == 416 and reported["artifact"].nunique() == 27
    assert {f"table{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17)} <= set(reported["artifact"])


PUBLISHED = (
    "table1", "table2", "table3", "table4", "table5", "table6", "table12", "table13", "table14", "table16", "table17",
    "rebuttal_sparse_registers", "rebuttal_extra_data", "table7", "table8", "table9", "table15",
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_value_has_its_cell_at_paper_scale(name, tmp_path):
    """Each published number once, beside the cell with its model, data, method, metric, settings and epochs."""
    found = evidence("paper", tmp_path)
    table = found.table(name)
    frame, published = found.frame(table), found.published(table).frame
    key = ["role", "method", "train_data", "benchmark", "metric"]
    ours = frame[frame["reported"].notna()]
    got = [ours[k].str.replace(r" \(.*", "", regex=True) for k in key]
    theirs = published.rename(columns={"model": "role"})
    if name in ("table7", "table8", "table9", "table15"):
        when, then = ours["iterations"].astype(int), theirs["iterations"].astype(int)
    else:
        when, then = ours["epochs"].astype(float).round(), theirs["epochs"].astype(float)
    assert sorted(zip(*got, when, ours["reported"], strict=True)) == sorted(
        zip(*(theirs[k] for k in key), then, theirs["value"].astype(float), strict=True)
    )
    assert {len(c.spec.seeds) for c in found.cells(table)} == {int(s) for s in published["seeds"]}


def test_settings_tables_say_what_the_protocol_says(tmp_path):
    """Best settings and budgets of the paper, read off the tables that the workflow writes."""
    found = evidence("paper", tmp_path)
    frames = {}
    for name in ("table10", "table11"):
        collect_artifact(found, found.table(name), tmp_path)
        frames[name] = found.frame(found.table(name))
        assert run_cells(found.table(name), found.scale) == []

    def value(name, metric, **where):
        frame = frames[name][frames[name]["metric"] == metric]
        for column, wanted in where.items():
            frame = frame[frame[column] == wanted]
        return frame["mean"].item()

    mutor = {"gsm8k": (4, 0.3), "1m-gsm": (4, 0.3), "1m-math": (4, 0.3), "aqua-rat": (4, 0.3), "2m-gsm": (6, 0.1),
             "samsum": (3, 0.5), "dialogsum": (4, 0.5)}  # fmt: skip
    for data, wanted in mutor.items():
        got = [value("table11", metric, train_data=data, method="mutor") for metric in ("d_max", "a")]
        assert tuple(got) == wanted
    assert value("table10", "learning_rate", role="gemma-2b", train_data="gsm8k") == 5e-5
    assert value("table10", "learning_rate", role="llama-3-8b", train_data="gsm8k") == 2e-5
    assert value("table10", "epochs", role="gemma-2b", train_data="samsum") == 3
    assert value("table10", "max_tokens", role="gemma-2b", train_data="1m-math") == 768
    assert "| gemma-2b: next_token on gsm8k | 5e-05 | 10 | 5 |" in (tmp_path / "table10.md").read_text()


def test_sweep_figure_is_drawn_with_and_without_runs(tmp_path):
    collect("paper", "table4", tmp_path / "runs", tmp_path)
    empty = (tmp_path / "table4.svg").read_text()
    for cell in cells_of(load_table(ROOT, "table4"), load_scale(ROOT, "paper")):
        for seed in cell.spec.seeds:
            made = record(cell.spec, seed, 50.0)
            made["checkpoints"][0] |= {"metrics": {"accuracy": 40.0 + seed % 3}, "scores": {}}
            write_json(records.seed_folder(tmp_path / "runs", cell.spec, seed) / "metrics.json", made)
    files = collect("paper", "table4", tmp_path / "runs", tmp_path)
    assert [f.suffix for f in files] == [".csv", ".md", ".tex", ".png", ".svg"]
    full = (tmp_path / "table4.svg").read_text()
    assert "parallel_mtp" in full and "d_max" in full and len(full) > len(empty)
    frame = pd.read_csv(files[0])
    assert frame["n_seeds"].eq(3).all() and frame["mean"].eq(41.0).all()
    assert frame["reported_difference"].to_numpy() == pytest.approx((frame["mean"] - frame["reported"]).to_numpy())


def test_texts_are_read_as_they_are_written():
    """A name of a user's may hold what means something in Markdown or LaTeX."""
    words = "a|b <i>c</i> \\d ^e ~f {g} 5% $h #i _j & k\nl"
    row = grid(pd.DataFrame({words: [words]}, index=pd.Index(["x"], name="n"))).splitlines()
    cell = r"a\|b &lt;i>c&lt;/i> \\d ^e ~f {g} 5% $h #i _j & k l"
    assert row == [f"| n | {cell} |", "|---|---|", f"| x | {cell} |"]
    assert latex_text(words) == (
        r"a\ensuremath{|}b \ensuremath{<}i\ensuremath{>}c\ensuremath{<}/i\ensuremath{>} \textbackslash{}d "
        r"\textasciicircum{}e \textasciitilde{}f \{g\} 5\% \$h \#i \_j \& k l"
    )
