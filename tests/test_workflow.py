"""The workflow from configuration to figure: one real pass at smoke scale, and what is done after it."""

import functools
import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from mutor.config.load import load_scale
from mutor.config.runs import make_spec
from mutor.files import locked
from mutor.results import records
from mutor.results.cells import COLUMNS

ROOT = Path(__file__).parent.parent
pytest.importorskip("snakemake")


@pytest.fixture(scope="module")
def smoke(checkout, snakemake):
    """The checkout after a whole pass at smoke scale."""
    done = snakemake(checkout, "--cores", "2", "--config", "scale=smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout


def test_smoke_scale_runs_from_data_to_figure(smoke):
    frame = pd.read_csv(smoke / "results/smoke/figure4.csv")
    assert list(frame.columns) == [*COLUMNS]
    assert (frame["n_seeds"] == 2).all() and frame["mean"].between(0, 100).all()
    assert frame["ci_low"].isna().all()  # seeds that solve the task are counted, with exact intervals
    assert (frame["solved_low"] <= frame["n_solved"] / 2).all() and (
        frame["n_solved"] / 2 <= frame["solved_high"]
    ).all()
    assert frame["stands_in_for"].str.contains("gpt2-large").all()
    for ending in (".md", ".tex", ".png", ".svg", "_curves.png", "_curves.svg"):
        assert (smoke / f"results/smoke/figure4{ending}").stat().st_size > 500
    runs = pd.read_csv(smoke / "results/smoke/runs.csv")
    graphs = runs[runs["train_data_role"].str.startswith("star_graph")]
    assert len(graphs) == 24 and graphs["seed"].isin([42, 43]).all() and graphs["last.solve_rate"].notna().all()
    by_hand = runs[(runs["method"] == "next_token") & runs["path"].str.contains("/g2x3/")]["last.solve_rate"].mean()
    cell = frame[(frame["method"] == "next_token") & (frame["metric"] == "solve_rate")].iloc[0]
    assert cell["mean"] == pytest.approx(by_hand)
    log = next(smoke.glob("runs/smoke/g2x3/gpt2-2x32/mutor/a=0.5,d_max=3,d_min=2/run.log")).read_text()
    assert re.search(r"\[\d+/39\] g2x3 .* seed 43 \(2/2\): step 20/20  solve_rate", log)
    assert re.search(r"\[\d+/39\] finished: runs/smoke/g2x3/gpt2-2x32/mutor/\S+, seeds 42, 43$", log.strip())


def test_smoke_scale_runs_from_text_to_table(smoke):
    frame = pd.read_csv(smoke / "results/smoke/table1.csv")
    assert list(frame.columns) == [*COLUMNS] and list(frame["method"]) == ["next_token", "parallel_mtp", "mutor"]
    assert (frame["n_seeds"] == 2).all() and frame["mean"].between(0, 100).all() and frame["epochs"].eq(2).all()
    assert frame["reported"].tolist() == [38.87, 40.66, 42.1] and frame["reported_difference"].isna().all()
    runs = pd.read_csv(smoke / "results/smoke/runs.csv")
    texts = runs[runs["path"].str.contains("/gsm8k/|/mix/")]
    assert len(texts) == 7 and texts["last.loss"].between(2, 8).all()  # one base model for all
    decoded = pd.read_csv(smoke / "results/smoke/decoding.csv")
    same = decoded[decoded["metric"].str.startswith("identical") & (decoded["n_seeds"] > 0)]
    assert len(same) == 4 + 8 * 3 and (same["n_seeds"] == 1).all() and (same["mean"] == 100).all()
    assert len(list(smoke.glob("runs/smoke/mix/*/*/*/seed*/metrics.json"))) == 1


def test_smoke_scale_runs_from_images_to_table(smoke):
    """Three methods at three shares of the training, one tokenizer for all, pictures beside the records."""
    frame = pd.read_csv(smoke / "results/smoke/table7.csv")
    assert list(frame.columns) == [*COLUMNS] and len(frame) == 3 * 3 * 5 and (frame["n_seeds"] == 2).all()
    assert sorted(frame["iterations"].unique()) == [5, 10, 18]
    kinds = {"classifier_fid", "classifier_score", "precision", "recall", "log_likelihood"}  # no plain FID
    assert set(frame["metric"]) == kinds
    assert frame["reported"].isna().all()  # published are Inception's values, not these
    listed = (smoke / "results/smoke/table7.md").read_text().partition("Published values:")[2]
    assert all(f"| {value} |" in listed for value in ("7.71", "6.83", "6.18"))
    assert len(list(smoke.glob("runs/smoke/assets/digits-*/assets.json"))) == 1
    for name in ("samples-step5.png", "samples-step10.png", "samples-last.png"):
        assert len(list(smoke.glob(f"runs/smoke/digits/*/mutor_2d/default/seed*/{name}"))) == 2
    record = json.loads(next(smoke.glob("runs/smoke/digits/*/mutor_1d/default/seed42/metrics.json")).read_text())
    assert [c["step"] for c in record["checkpoints"] if "best" not in c["names"] or "last" in c["names"]][-1] == 18
    assert len(records.problem_scores(record, "step10", "class_accuracy")) == 50


def test_smoke_scale_ends_in_claims_and_a_report(smoke):
    claims = pd.read_csv(smoke / "results/smoke/claims.csv")
    artifacts = load_scale(ROOT, "smoke").artifacts
    wanted = claims[claims["table"].isin(artifacts)]
    assert wanted["verdict"].isin(["same direction", "opposite direction", "undecided", "not at this scale"]).all()
    table1 = claims[(claims["table"] == "table1") & (claims["verdict"] != "not at this scale")]
    assert len(table1) == 2 and (table1["n_seeds"] == 2).all() and table1["stands_in_for"].notna().all()
    page = (smoke / "results/smoke/report.html").read_text()
    assert all(f'<section id="{name}">' in page for name in artifacts)
    assert "No cell lacks a seed." in page


def test_nothing_to_do_does_nothing(smoke, snakemake):
    done = snakemake(smoke, "--cores", "2", "--config", "scale=smoke")
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr


def test_a_new_row_starts_no_finished_run_again(smoke, snakemake):
    table = smoke / "config/tables/sat.yaml"
    before = table.read_text()
    table.write_text(f"{before}  - {{model: small-decoder, train_data: sat, method: mutor, settings: {{a: 0.125}}}}\n")
    done = snakemake(smoke, "-n", "--config", "scale=smoke")
    table.write_text(before)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.split("/")[-1] for path in re.findall(r"Training (\S+)", done.stdout)] == ["a=0.125,d_max=3,d_min=2"]


def test_locks_of_a_dead_snakemake_are_removed_and_of_a_living_one_are_not(smoke, snakemake):
    locks = smoke / ".snakemake/locks"
    locks.mkdir(parents=True, exist_ok=True)
    for kind in ("input", "output"):
        (locks / f"0.{kind}.lock").write_text("runs/smoke/g2x3/gpt2-2x32/next_token/default/index.json\n")
    arguments = ("results/smoke/figure4.csv", "--cores", "1", "--forcerun", "figure4", "--config", "scale=smoke")
    with locked(smoke / ".snakemake/alive"):  # as a living one does
        done = snakemake(smoke, *arguments)
        assert done.returncode != 0 and "LockException" in done.stderr
    done = snakemake(smoke, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0.input.lock was left by a Snakemake that is gone: removed" in done.stderr and not list(locks.glob("*"))
    assert "finished: results/smoke/figure4.md" in done.stderr.splitlines()


def test_finished_seeds_survive_a_lost_output_and_a_new_seed(smoke, programs):
    """By Python as it is."""
    snakemake = functools.partial(programs(sys.executable), "snakemake")
    folder = smoke / "runs/smoke/g2x3/gpt2-2x32/next_token/default"
    before = (folder / "seed42/metrics.json").stat().st_mtime_ns
    (folder / "index.json").unlink()
    target = "runs/smoke/g2x3/gpt2-2x32/next_token/default/index.json"
    done = snakemake(smoke, target, "--cores", "1", "--config", "scale=smoke", "seeds=[42,43,44]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "seed42/metrics.json").stat().st_mtime_ns == before
    assert set(json.loads((folder / "index.json").read_text())["seeds"]) == {"42", "43", "44"}


def test_a_record_that_broke_after_its_run_is_made_again(smoke, snakemake):
    folder = smoke / "runs/smoke/g2x3/gpt2-2x32/next_token/default"
    before = (folder / "seed42/metrics.json").read_text()
    (folder / "seed42/metrics.json").write_text(before[:1000])
    target = "runs/smoke/g2x3/gpt2-2x32/next_token/default/index.json"
    done = snakemake(smoke, target, "--cores", "1", "--config", "scale=smoke", "seeds=[42,43,44]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"seed42/metrics\.json has 1000 bytes of \d+; it is run again", done.stderr)
    again, old = json.loads((folder / "seed42/metrics.json").read_text()), json.loads(before)
    assert again["checkpoints"][-1]["metrics"] == old["checkpoints"][-1]["metrics"]
    (folder / "index.json").write_text("[]")
    assert "index.json can't be read; it is run again" in snakemake(smoke, "-n", "--config", "scale=smoke").stderr
    assert snakemake(smoke, target, "--cores", "1", "--config", "scale=smoke", "seeds=[42,43,44]").returncode == 0


def test_cells_without_runs_are_empty_rows(smoke, tmp_path, program):
    runs = tmp_path / "runs"
    scale = load_scale(ROOT, "smoke")
    spec = make_spec(scale, "g2x3", "gpt2-2x32", "next_token", {})
    source = records.seed_folder(smoke / "runs", spec, 42) / "metrics.json"
    target = records.seed_folder(runs, spec, 42) / "metrics.json"
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)  # a record made elsewhere merges in by copying it
    arguments = ("collect", "figure4", "runs", "--scale", "smoke", "--runs", runs, "--results", tmp_path / "out")
    done = program("mutor", ROOT, *arguments)
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path / "out/figure4.csv")
    assert len(frame) == 22
    have = frame[frame["n_seeds"] > 0]
    assert set(have["method"]) == {"next_token"} and (have["n_seeds"] == 1).all() and have["std"].isna().all()
    assert frame[frame["n_seeds"] == 0][["mean", "std", "ci_low", "ci_high"]].isna().all().all()
    assert len(pd.read_csv(tmp_path / "out/runs.csv")) == 1


def test_snakemake_report_works(smoke, tmp_path, snakemake):
    done = snakemake(smoke, "--report", str(tmp_path / "report.html"), "--config", "scale=smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "figure4" in (tmp_path / "report.html").read_text()


def test_cleanup_frees_models_and_keeps_metrics(smoke, program):
    done = program("mutor", ROOT, "cleanup", "--scale", "smoke", "--runs", smoke / "runs")
    assert done.returncode == 0 and "freed" in done.stdout
    assert not list(smoke.glob("runs/**/model.safetensors")) and list(smoke.glob("runs/**/metrics.json"))


def test_a_users_own_model_and_data(tmp_path, snakemake, copied):
    """200 lines of JSONL and a model folder, named in config/scales/own.yaml: every method, one command, a table."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mutor.tasks import standins

    folder = copied(tmp_path / "project")
    words = standins.tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    for part in (model, words):
        part.save_pretrained(folder / "mine")
    (folder / "data").mkdir()
    for name, first, count in (("train", 0, 200), ("test", 200, 30)):
        sums = [(n, (7 * n) % 50) for n in range(first, first + count)]
        lines = [
            {
                "prompt": f"Question: {a} + {b} = ?\n\nAnswer:",
                "answer": f"{a} + {b} = {a + b} #### {a + b}",
                "gold": str(a + b),
            }
            for a, b in sums
        ]
        (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = folder / "config/scales/own.yaml"
    text = file.read_text().replace("HuggingFaceTB/SmolLM2-135M", "mine").replace("epochs: 3", "epochs: 1")
    text = text.replace("extract: whole", "extract: hashes").replace("compare: text", "compare: number")
    file.write_text(text.replace("max_tokens: 512", "max_tokens: 100").replace("new_tokens: 128", "new_tokens: 16"))
    done = snakemake(folder, "results/own/own.csv", "--cores", "2", "--config", "scale=own", "seeds=[42]")
    assert done.returncode == 0, done.stdout + done.stderr
    end = (done.stdout + done.stderr).partition("mine, accuracy on test.jsonl: ")[2]
    assert "mutor against next_token: undecided" in end  # a single seed decides nothing
    frame = pd.read_csv(folder / "results/own/own.csv")
    methods = {"next_token", "parallel_mtp", "sequential_mtp", "mutor", "lora_next_token", "lora_mutor"}
    assert set(frame["method"]) == methods and (frame["n_seeds"] == 1).all() and frame["mean"].between(0, 100).all()
    assert set(frame["train_data"]) == {"train"} and list(frame.columns) == [*COLUMNS]
