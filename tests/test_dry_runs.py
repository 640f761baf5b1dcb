"""What the workflow would run, at every scale, on clusters, and what it refuses before anything runs."""

import re
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

from mutor.config.load import load_scale, load_table, scale_names, table_names
from mutor.config.runs import run_cells, specs_of

ROOT = Path(__file__).parent.parent
pytest.importorskip("snakemake")


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
TUNED = 16 + 7  # what is gentle, and what is known ahead of the same models; laptop: without 7 remedies
AHEAD = 10  # the rows of foresight; at gpu scale 7 more, by characters
# paths: five methods on a random graph and on Blocksworld; gpu: on graphs of three sizes and on five numbers of
# Blocksworld's paths, three with another width, five more on the first size, three more on two numbers
PATHS = 5 + 5
PLANNED = 5  # formulas; gpu: with more heads, chains of facts, and countdown
JOBS = {
    "smoke": 12 + 4 + 3 + AHEAD + 3 + 1 + 3 * 2,
    "laptop": 12 + IMAGES + LANGUAGE - 6 + 3 + TUNED - 7 + AHEAD + PATHS + PLANNED,
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


def test_a_new_drawing_is_one_entry_and_its_functions(tmp_path, snakemake, copied):
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


def test_folder_that_snakemake_takes_for_a_pattern_is_refused(tmp_path, snakemake, copied):
    done = snakemake(copied(tmp_path / "a{b}"), "-n", "--config", "scale=smoke")
    assert (
        done.returncode != 0
        and "a{b}: Snakemake can't work in a folder with braces in its name" in done.stdout + done.stderr
    )


def test_resources_of_jobs_on_a_cluster(tmp_path, snakemake, copied):
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
