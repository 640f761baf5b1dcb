"""The workflow from configuration to figure: dry runs of every scale, one real pass at smoke scale."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from mutor.config.load import load_scale, load_table, scale_names, table_names
from mutor.config.runs import make_spec, run_cells, specs_of
from mutor.files import locked
from mutor.results import records
from mutor.results.cells import COLUMNS

ROOT = Path(__file__).parent.parent
pytest.importorskip("snakemake")


def programs(python):
    """program("snakemake", folder, ...): what `python -m snakemake ...` does in a folder."""

    def program(name, folder, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [python, "-m", name, *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return program


@pytest.fixture(scope="module")
def program(python):
    """Programs by a Python that has imported what they need, and so have those that Snakemake starts."""
    return programs(python)


@pytest.fixture(scope="module")
def snakemake(program):
    """snakemake(folder, ...)"""
    return functools.partial(program, "snakemake")


def copied(folder):
    """A copy of the project without its runs and results."""
    folder.mkdir(exist_ok=True)
    for name in ("Snakefile", "workflow", "config", "profiles", "mutor", "baselines", "benchmarks", "environment.yml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project, shared by tests, in a folder with a space and a quote."""
    return copied(tmp_path_factory.mktemp("it's a project"))


@pytest.fixture(scope="module")
def smoke(checkout, snakemake):
    """The checkout after a whole pass at smoke scale."""
    done = snakemake(checkout, "--cores", "2", "--config", "scale=smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout


# counted by hand from the tables: star graphs as in test_config, and at paper scale settings that tables share, once:
# gemma: next_token 8 corpora, 5 of them longer too; parallel_mtp 7 + 5 longer, and d_max 3, 4, 6 on 2 (2 is there);
# sequential_mtp 3; mutor 7, d_max 2, 3, 6 on 2, a 0.1, 0.2, 0.4, 0.5 on 2, per_offset and every second token on 2;
# LoRA 2 x 2; llama: next_token 4 + 2 longer, parallel_mtp 4 + 2 longer, mutor 4
PAPER = 16 + (8 + 5) + (7 + 5 + 6) + 3 + (7 + 6 + 8 + 4) + 4 + (6 + 6 + 4)
# at laptop scale the same of language models, but for six of the second model, and three base models
# images: three methods, random registers at d_max 4, 3 and 5, next_token longer
IMAGES = 3 + 3 + 1
# at gpu scale, GSM8K by next_token, parallel_mtp, sequential_mtp and mutor (table 16; table 1 has three of them)
LANGUAGE = PAPER - 16
TUNED = 16 + 7  # what is gentle, and what is known ahead of the same models
AHEAD = 10  # the rows of foresight; at gpu scale 7 more, by characters
# paths: five methods on a random graph and on Blocksworld; gpu: on graphs of three sizes and on five numbers of
# Blocksworld's paths, three with another width, five more on the first size, three more on two numbers
PATHS = 5 + 5
PLANNED = 6  # formulas; gpu: with more heads, chains of facts, and countdown
JOBS = {
    "smoke": 12 + 4 + 3 + AHEAD + 3 + 1 + 3 * 2,
    "laptop": 12 + IMAGES + LANGUAGE - 6 + 3 + TUNED + AHEAD + PATHS + PLANNED,
    "gpu": 52 + IMAGES + 4 + TUNED + AHEAD + 7 + 3 * 5 + 5 * 5 + 3 + 5 + 2 * 3 + 8 + 7 + 9,
    "paper": PAPER + IMAGES + TUNED, "own": 7,  # with the model before fine-tuning
}  # fmt: skip


@pytest.mark.parametrize("scale", scale_names(ROOT))
def test_dry_run_lists_exactly_the_configured_jobs(checkout, scale, snakemake):
    done = snakemake(checkout, "-n", "--config", f"scale={scale}")
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = load_scale(ROOT, scale)
    tables = [load_table(ROOT, name) for name in loaded.artifacts]
    specs = specs_of([cell for table in tables for cell in run_cells(table, loaded)])
    assert len(specs) == JOBS[scale]
    listed = set(re.findall(r"Training (\S+)", done.stdout + done.stderr))
    assert listed == {spec.path for spec in specs}
    assert re.search(rf"^train\s+{len(specs)}$", done.stdout + done.stderr, re.M)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["scale=lapptop"], "did you mean 'laptop'"),
        (["scael=smoke"], "unknown key 'scael', did you mean 'scale'"),
        (["artifacts=[figure44]"], "did you mean 'figure4'"),
        (["runs=a{b}"], "runs: 'a{b}' is not allowed; allowed: a folder without braces in its name"),
    ],
)
def test_wrong_configuration_stops_the_workflow_at_once(checkout, changes, says, snakemake):
    done = snakemake(checkout, "-n", "--config", *changes)
    assert done.returncode != 0 and says in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["results/tabel1.csv"],
            "error: results/tabel1.csv: 'tabel1' is unknown, did you mean 'table1'? Known: blocksworld, claims, ",
        ),
        (
            ["results/table1.csv", "--config", "scale=paper"],
            "error: results/table1.csv is of scale laptop (--config scale=laptop); table1 of scale paper is "
            "results/paper/table1.csv",
        ),
    ],
)
def test_a_target_of_no_artifact_or_another_scale_is_one_line(checkout, words, says, snakemake):
    (checkout / "results").mkdir(exist_ok=True)
    (checkout / "results/table1.csv").write_text("the laptop scale's")
    done = snakemake(checkout, "-n", *words)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and last.startswith(says) and "Traceback" not in done.stderr, done.stderr


def test_artifacts_of_another_scale_stand_in_their_own_folder(checkout, snakemake):
    own = snakemake(checkout, "-np", "results/table10.csv").stdout
    other = snakemake(checkout, "-np", "results/paper/table10.csv", "--config", "scale=paper").stdout
    given = snakemake(checkout, "-np", "results/table10.csv", "--config", "scale=paper", "results=results").stdout
    asked = r"collect table10 --scale (\w+) --runs runs --results (\S+) "
    assert [re.findall(asked, text) for text in (own, other, given)] == [
        [("laptop", "results")], [("paper", "results/paper")], [("paper", "results")],
    ]  # fmt: skip


def test_what_runs_would_stop_at_is_said_before_the_first(checkout, tmp_path, snakemake):
    """One line; a dry run lists its jobs and ends with all such lines."""
    train, test = (f"{name}_file: there is no file data/{name}.jsonl" for name in ("train", "test"))
    where = "config/scales/own.yaml: datasets: mine: options: "
    done = snakemake(checkout, "--cores", "1", "--config", "scale=own")
    assert done.returncode != 0 and done.stderr.splitlines()[-1] == f"error: {where}{train}", done.stderr
    assert not list(checkout.glob("runs/own/**/run.log"))
    done = snakemake(checkout, "-n", "--config", "scale=own")
    said = [
        line for line in done.stderr.splitlines() if line.startswith("not ready: ")
    ]  # tests have no network, either
    assert done.returncode == 0 and said[:2] == [f"not ready: {where}{train}", f"not ready: {where}{test}"]
    (tmp_path / "taken").write_text("")
    done = snakemake(checkout, "results/table10.csv", "--cores", "1", "--config", f"runs={tmp_path}/taken/runs")
    assert done.returncode != 0 and done.stderr.splitlines()[-1].startswith(
        f"error: runs: {tmp_path}/taken/runs can't be"
    )


def test_artifacts_are_listed_by_name(checkout, snakemake):
    assert {*table_names(ROOT), "all", "claims"} <= set(snakemake(checkout, "--list").stdout.split())


def test_a_new_drawing_is_one_entry_and_its_functions(tmp_path, snakemake):
    """The rules find it and its figures: an entry of DRAWINGS, a function, and a table that is drawn so."""
    folder = copied(tmp_path / "project")
    with open(folder / "mutor/registry.py", "a") as file:
        file.write(
            'figures = (Figure(draw="mutor.baselines.toy:draw", suffix="_toy"),)\n'
            'register(DRAWINGS, "toy", Drawing(made_of="config", rows="mutor.baselines.toy:rows", figures=figures))\n'
        )
    (folder / "baselines/toy.py").write_text(
        "def rows(evidence, table):\n"
        '    return [{"metric": "steps", "mean": 3.0, "label": "one"}]\n\n\n'
        "def draw(evidence, table):\n"
        "    from matplotlib.figure import Figure\n\n"
        "    return Figure()\n"
    )
    text = "title: Toy\ncaption: A toy.\ndraw: toy\nmetrics: [steps]\nrows: []\n"
    (folder / "config/tables/toy.yaml").write_text(text)
    done = snakemake(folder, "results/smoke/toy_toy.svg", "--cores", "1", "--config", "scale=smoke")
    assert done.returncode == 0 and re.search(r"^toy\s+1$", done.stdout + done.stderr, re.M), done.stderr
    assert pd.read_csv(folder / "results/smoke/toy.csv")["mean"].tolist() == [3.0]
    assert {f.name for f in (folder / "results/smoke").iterdir()} == {
        f"toy{ending}" for ending in (".csv", ".md", ".tex", "_toy.png", "_toy.svg")
    }


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_account_and_partition_stand_outside_of_the_repository():
    """Named in a file that git tracks, they would make every record say that the code was changed."""
    words = (ROOT / "README.md").read_text()
    assert "copy `profiles/slurm` to `profiles/site`" in words and "--workflow-profile profiles/site" in words
    # with --profile that of one machine counts as well, whose one GPU would be the most that a job gets
    assert yaml.safe_load((ROOT / "profiles/default/config.yaml").read_text())["resources"] == ["gpu=1"]
    assert "--workflow-profile profiles/slurm" in (ROOT / "profiles/slurm/config.yaml").read_text()
    ignored = subprocess.run(["git", "check-ignore", "profiles/site/config.yaml"], cwd=ROOT, capture_output=True)
    assert ignored.returncode == 0


@pytest.mark.parametrize("runs", ["my runs", "it's; touch /tmp/never", "a$(touch never)b", "-r"])
def test_folders_of_any_name_are_quoted(checkout, runs, snakemake):
    """A folder with a space or a quote is a folder, and no command."""
    changes = ["scale=smoke", f"runs={runs}", "results=results of mine"]
    done = snakemake(checkout, "-np", "results of mine/figure4.csv", "--config", *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if "-m mutor run" in line]
    assert len(lines) > 5 and all(line[line.index("--runs") + 1] == runs for line in lines)
    collect = next(shlex.split(line) for line in done.stdout.splitlines() if "-m mutor collect figure4" in line)
    assert collect[collect.index("--results") + 1] == "results of mine"


def test_folder_that_snakemake_takes_for_a_pattern_is_refused(tmp_path, snakemake):
    done = snakemake(copied(tmp_path / "a{b}"), "-n", "--config", "scale=smoke")
    assert (
        done.returncode != 0
        and "a{b}: Snakemake can't work in a folder with braces in its name" in done.stdout + done.stderr
    )


def test_resources_of_jobs_on_a_cluster(tmp_path, snakemake):
    """One node and one task, twice the memory in a second try; what a node can't hold is spread over nodes by srun."""
    folder = copied(tmp_path / "project")
    rules = folder / "workflow/rules/train.smk"
    rules.write_text(rules.read_text().replace('    message:\n        "Training {wildcards.run}"\n', ""))  # all is told
    target = "runs/paper/gsm8k/{}/next_token/default/index.json"
    targets = [target.format(model) for model in ("llama-3-8b", "gemma-2b")]
    scale = load_scale(ROOT, "paper")
    said = {}
    for attempt, changes in ((1, []), (2, ["processes_per_node=4"])):
        words = ("-np", "--workflow-profile", "none", "--attempt", attempt, *targets, "--config", "scale=paper")
        done = snakemake(folder, *words, *changes)
        assert done.returncode == 0, done.stdout + done.stderr
        for job in re.split(r"\nrule ", done.stdout):
            model = re.search(r"paper/gsm8k/([\w-]+)/", job)
            if model and "-m mutor run" in job:
                said[model[1], attempt] = dict(re.findall(r"(\w+)=([^,\n]+)", job)), job
    for model, processes in (("llama-3-8b", 5), ("gemma-2b", 1)):
        resources, job = said[model, 1]
        assert (resources["nodes"], resources["tasks"], resources["gpu"]) == ("1", "1", str(processes))
        assert int(resources["mem_mb"]) == scale.memory_mb * processes and "srun" not in job
    resources, job = said["llama-3-8b", 2]
    assert (resources["nodes"], resources["tasks"], resources["mpi"]) == ("2", "5", "srun")
    assert int(resources["mem_mb"]) == scale.memory_mb * 3 * 2  # of a node with 3 of the 5 processes
    assert re.search(rf"srun --nodes 2 --ntasks 5 --cpus-per-task {scale.threads} .* -m mutor run ", job)
    assert int(said["gemma-2b", 2][0]["mem_mb"]) == scale.memory_mb * 2 and "srun" not in said["gemma-2b", 2][1]


def test_seeds_given_to_the_workflow_reach_its_commands(checkout, snakemake):
    arguments = ("-n", "-p", "--config", "scale=smoke", "seeds=[7,8]", "artifacts=[figure4]")
    done = snakemake(checkout, *arguments)
    commands = re.findall(r"-m mutor (run|collect \w+) (.*)", done.stdout + done.stderr)
    assert done.returncode == 0 and {name for name, _ in commands} >= {"run", "collect figure4", "collect report"}
    assert all("--seeds 7 8 " in words for _, words in commands)


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


def test_finished_seeds_survive_a_lost_output_and_a_new_seed(smoke):
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


def test_a_users_own_model_and_data(tmp_path, snakemake):
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
