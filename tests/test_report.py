"""The page of results: what stands on it, and how it behaves in a real browser."""

import base64
import gzip
import html
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from mutor.cli import main
from mutor.config.load import load_scale, load_table
from mutor.config.runs import cells_of, settings_name
from mutor.files import write_json
from mutor.results import cells, claims, records, render
from mutor.results.cells import Evidence
from mutor.results.report import _grid, missing
from tests.test_claims import put

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=20000", "--enable-logging=stderr",
]  # fmt: skip
# types into the claims' search field, sorts runs by minutes, and writes down what it sees
PROBE = """<script>
const wait = setInterval(() => {
  if (!document.body.dataset.ready) return;
  clearInterval(wait);
  const shown = id => [...document.querySelectorAll(`#${id} tbody tr`)].map(r => r.cells[0].textContent.trim());
  const all = shown("claims").length;
  const field = document.querySelector("#claims-part input[type=search]");
  field.value = "reversed"; field.dispatchEvent(new Event("input", {bubbles: true}));
  setTimeout(() => {
    const head = [...document.querySelectorAll("#runs thead th")].find(t => t.textContent.trim() == "minutes");
    const column = [...head.parentNode.children].indexOf(head);
    const rows = () => [...document.querySelectorAll("#runs tbody tr")];
    head.click();
    setTimeout(() => {
      const found = {all, searched: shown("claims"), up: rows().map(r => parseFloat(r.cells[column].textContent)),
                     broken: [...document.images].filter(i => !i.naturalWidth).length,
                     wide: document.documentElement.scrollWidth > document.documentElement.clientWidth + 1,
                     without: [...document.querySelectorAll("img:not([alt]), th:not([scope])")].length};
      const out = document.createElement("pre"); out.id = "probe"; out.textContent = JSON.stringify(found);
      document.body.append(out);
    }, 300);
  }, 300);
}, 50);
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """report.html of the laptop reference, its figures drawn anew."""
    folder = tmp_path_factory.mktemp("report")
    runs = str(ROOT / "results/reference/laptop/runs")
    assert main(["collect", "--scale", "laptop", "--runs", runs, "--results", str(folder)]) == 0
    return folder / "report.html"


def more_rows(text, table):
    """The rows of a table that its page makes when they are shown."""
    packed = re.search(rf'<script type="application/octet-stream" data-of="{table}">(.*?)</script>', text)
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_words_that_are_typed_stand_as_code(page):
    assert "<p><strong><code>python -m mutor try MODEL train.jsonl test.jsonl</code> " in page.read_text()


def test_everything_stands_on_one_page(page):
    text = page.read_text()
    assert page.stat().st_size < 5e6
    scale = load_scale(ROOT, "laptop")
    for name in scale.artifacts:
        assert f'<section id="{name}">' in text and f'id="{name}-cells"' in text
    drawn = [len(load_table(ROOT, name).drawing.figures) for name in scale.artifacts]
    assert text.count('<img src="data:image/') == sum(drawn) + 1  # and that of the verdict
    for section in ("claims-part", "missing-part", "runs-part"):
        assert f'id="{section}"' in text
    assert "Not the published experiment." in text and text.count("gpt2-large (here a GPT-2 of 4 layers x 64)") >= 2
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text) and "@import" not in text
    assert re.search(r"Training took \d+\.\d\d core hours on cpu", text)
    commits = {r["git_commit"][:10] for r in records.Records(ROOT / "results/reference/laptop/runs").of_scale("laptop")}
    assert all(commit in text + json.dumps(more_rows(text, "runs")) for commit in commits)


def test_a_column_is_sorted_by_values_in_all_rows_or_none():
    """A browser hangs where the first row's cell has a value to sort by and none of the rows beyond the first 100."""
    frame = pd.DataFrame({"score": [0.5] + [None] * 149, "name": ["a"] * 150})
    grid = _grid(frame)
    orders = [[order for _, order, _ in row] for row in grid["rows"]]
    assert orders == [[0.5, None]] + [["", None]] * 99
    added = json.loads(gzip.decompress(base64.b64decode(grid["more"])))
    assert added == [[{"display": "", "@data-order": ""}, "a"]] * 50


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: `apt-get install chromium` lets this test run")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(page, tmp_path, width):
    probed = tmp_path / "report.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=600)  # a page may hang
    assert not re.findall(r"CONSOLE.*(?:Error|Uncaught|error).*", done.stderr)
    found = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)[1]))
    assert found["all"] >= 10 and len(found["searched"]) == 1  # the claim on reversed paths
    assert all("reversed" in row for row in found["searched"])
    runs = records.Records(ROOT / "results/reference/laptop/runs").of_scale("laptop")
    minutes = sorted(record["seconds_training"] / 60 for record in runs)
    assert len(minutes) > 100 and found["up"] == pytest.approx(minutes[:100], rel=0.05)  # of all, not of the first 100
    assert (found["broken"], found["without"], found["wide"]) == (0, 0, False)


def test_without_runs_it_says_how_to_start(tmp_path):
    assert main(["collect", "--scale", "laptop", "--runs", str(tmp_path / "none"), "--results", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "There are no runs yet." in text and "make reproduce" in text and "Nothing has run yet." in text
    assert "snakemake --cores all results/figure4.csv --config scale=laptop" in text
    assert (tmp_path / "claims.csv").exists() and (tmp_path / "runs.csv").exists()


def test_missing_seeds_are_listed(tmp_path):
    def listed(seeds=None):
        evidence = Evidence(ROOT, load_scale(ROOT, "laptop"), records.Records(tmp_path / "runs"), seeds)
        return missing(evidence, [evidence.table("gentle")]), evidence.runs.problems

    for cell in cells_of(load_table(ROOT, "gentle"), load_scale(ROOT, "laptop")):
        for seed in {*cell.spec.seeds, 43}:
            put(tmp_path / "runs", cell, seed, 100, metric="accuracy")
    assert len(listed()[0]) == 0
    assert set(listed(seeds=(43, 7))[0]["seeds"]) == {"7"}
    file = tmp_path / "runs/laptop/word-problems/gemma-4x128/parallel_mtp/default/seed43/metrics.json"
    file.write_text("{")
    rows, problems = listed()
    row = rows.iloc[0]
    assert (row["seeds"], row["artifacts"]) == ("43", "gentle") and "parallel_mtp" in row["setting"]
    assert len(problems) == 1 and "metrics.json: not JSON at line 1" in problems[0]


def test_seeds_of_the_configuration_reach_plan_run_and_what_is_missing(tmp_path, monkeypatch, capsys):
    import mutor.training.run

    (tmp_path / "config").mkdir()
    for file in (ROOT / "config").iterdir():
        (tmp_path / "config" / file.name).symlink_to(file)
    (tmp_path / "config/config.yaml").unlink()
    text = (ROOT / "config/config.yaml").read_text()
    (tmp_path / "config/config.yaml").write_text(text.replace("seeds: null", "seeds: [7, 8, 9]"))
    monkeypatch.chdir(tmp_path)

    assert main(["plan", "figure4", "--scale", "smoke"]) == 0
    assert "12 settings, 36 seeded runs to do" in capsys.readouterr().out

    asked = []
    monkeypatch.setattr(mutor.training.run, "run", lambda spec, seeds, env: asked.append(seeds))
    one = ["run", "--scale", "smoke", "--data", "g2x3", "--model", "gpt2-2x32", "--method", "next_token"]
    assert main(one) == main([*one, "--seeds", "5"]) == 0
    assert asked == [(7, 8, 9), (5,)]

    for more, seeds in ([], "7, 8, 9"), (["--seeds", "3", "4"], "3, 4"):
        assert main(["collect", "report", "--scale", "smoke", *more]) == 0
        page = (tmp_path / "results/smoke/report.html").read_text()
        lacking = re.findall(r'<th scope="row">smoke/g2x3/[^<]*</th>\s*<td>([^<]*)</td>', page)
        assert len(lacking) >= 4 and set(lacking) == {seeds}


def counted(monkeypatch, module, name, key):
    """How often a function is called, by a key of its arguments."""
    calls, real = Counter(), getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (calls.update([key(*args)]), real(*args))[1])
    return calls


def test_everything_is_computed_once_of_a_thousand_records(tmp_path, monkeypatch):
    """Tables read and expanded, cells, claims and records read: tables, claims, runs and report share them all."""
    source = ROOT / "results/reference/laptop/runs/laptop"
    known = [json.loads(f.read_text()) for f in sorted(source.glob("g2x4/*/*/*/seed*/metrics.json"))]
    for number in range(1000):
        record = dict(known[number % len(known)], seed=1000 + number)
        setting = settings_name(record["settings"])
        folder = tmp_path / "runs/laptop/g2x4/gpt2-4x64" / record["method"] / setting / f"seed{1000 + number}"
        write_json(folder / "metrics.json", record)
    done = {
        "tables read": counted(monkeypatch, cells, "load_table", lambda root, name: name),
        "tables expanded": counted(monkeypatch, cells, "cells_of", lambda table, scale, seeds: table.name),
        "cells computed": counted(monkeypatch, Evidence, "_frame", lambda self, table: table.name),
        "tables laid out": counted(monkeypatch, render, "_shape", lambda frame, table: table.name),
        "claims judged": counted(monkeypatch, claims, "_claim_frame", lambda evidence: "all"),
        "records read": counted(monkeypatch, records, "read", lambda file: file),
    }
    assert main(["collect", "--scale", "laptop", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]) == 0
    artifacts = load_scale(ROOT, "laptop").artifacts
    assert {what: max(calls.values()) for what, calls in done.items()} == dict.fromkeys(done, 1)
    assert done["tables laid out"].keys() == {*artifacts} <= done["cells computed"].keys() <= done["tables read"].keys()
    assert len(done["records read"]) == 1000
    assert (tmp_path / "report.html").stat().st_size < 5e6
    text = (tmp_path / "report.html").read_text()
    assert "1000 seeded runs" in text
    rows = more_rows(text, "runs")
    assert (
        len(rows) == 900
        and re.findall(r'<table class="data" id="runs">.*?</table>', text, re.S)[0].count("<tr>") == 101
    )
    assert sorted(int(row[1]) for row in rows)[-1] == 1999 and set(rows[-1][3]) == {"display", "@data-order"}
