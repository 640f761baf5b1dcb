"""Files that were harmed, are wrong or can't be written: named, and never part of a result without a word."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_run import ROOT, smoke_spec

from mutor.cli import main
from mutor.config.load import load_scale, read_yaml
from mutor.files import write_json
from mutor.models import hub
from mutor.results import provenance, records
from mutor.results.cells import Evidence
from mutor.results.drawings import collect_runs
from mutor.results.flops import training_flops
from mutor.results.published import read_reported
from mutor.results.render import markdown
from mutor.training.run import RunEnvironment, run

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(value, path=()):
    """The path of everything inside a JSON value; of each list the first two."""
    yield path
    inside = value if isinstance(value, dict) else dict(enumerate(value[:2])) if isinstance(value, list) else {}
    for key, inner in inside.items():
        yield from places(inner, (*path, key))


@st.composite
def harmed(draw, text):
    """The text of a record with one thing wrong: a value replaced, a field lost or added, bytes lost or changed."""
    kind, record = draw(st.sampled_from(["replaced", "replaced", "lost", "added", "cut", "changed"])), json.loads(text)
    if kind in ("cut", "changed"):
        raw, at = bytearray(text.encode()), draw(st.integers(0, len(text) - 1))
        if kind == "cut":
            return bytes(raw[:at])
        raw[at] = draw(st.integers(0, 255))
        return bytes(raw)
    *path, last = draw(st.sampled_from([path for path in places(record) if path]))
    inside = record
    for key in path:
        inside = inside[key]
    if kind == "lost":
        del inside[last]
    elif kind == "added" and isinstance(inside, dict):
        inside[draw(st.text(max_size=5))] = draw(JSON)
    else:
        inside[last] = draw(JSON)
    return json.dumps(record).encode()


@pytest.fixture(scope="module")
def shown():
    """A setting that figure 4 shows."""
    return smoke_spec("next_token")


@pytest.fixture(scope="module")
def pair(shown, tmp_path_factory):
    """Two seeds of this setting, the text of one's record, and its file."""
    runs, spec = tmp_path_factory.mktemp("fuzzed"), smoke_spec("next_token", save_every=4, eval_every=4, log_every=4)
    whole = tmp_path_factory.mktemp("whole")
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=whole))
    record = json.loads((records.seed_folder(whole, spec, 7) / "metrics.json").read_text())
    record |= {"config": shown.as_dict(), "config_hash": shown.config_hash}
    for seed in (7, 8):
        write_json(records.seed_folder(runs, shown, seed) / "metrics.json", record | {"seed": seed})
    file = records.seed_folder(runs, shown, 7) / "metrics.json"
    return runs, file, file.read_text()


@pytest.fixture(scope="module")
def smoke():
    """The scale, and all that is known of it without a run."""
    return Evidence(ROOT, load_scale(ROOT, "smoke"), records.Records(Path("/none")))


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(data=st.data())
def test_no_record_stops_collecting_or_adds_a_number_of_its_own(shown, pair, smoke, data):
    runs, file, text = pair
    file.write_bytes(data.draw(harmed(text)))
    evidence = Evidence(ROOT, smoke.scale, records.Records(runs))
    table = smoke.table("figure4")
    evidence.once("cells", table.name, lambda: smoke.cells(table))  # no record has a say in it
    frame = evidence.frame(table)
    last = next(c for c in json.loads(text)["checkpoints"] if "last" in c["names"])["metrics"]
    for cell in frame[frame["n_seeds"] > 0].to_dict("records"):
        if cell["metric"] in ("solve_rate", "first_step_accuracy"):  # a changed one contradicts its problems' scores
            assert set(cell["values"]) == {last[cell["metric"]]}
        asked = shown.config_hash.encode() in file.read_bytes()
        assert cell["n_seeds"] == 2 or (cell["n_seeds"] == 1 and (evidence.runs.problems or not asked))
    assert "Star graphs" in markdown(evidence, table)
    collect_runs(evidence, runs)
    for record in evidence.runs.of_scale("smoke"):
        assert all(isinstance(name, str) for name in provenance.changed_code(record, ROOT))
        training_flops(record)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: 1\nb: {c: 1, c: 2}\n", "not valid YAML: the key 'c' stands twice, again in line 2"),
        (b"a: 1\nb: 2\na: 3\n", "not valid YAML: the key 'a' stands twice, again in line 3"),
        (b"a: \xff\n", "not UTF-8 at byte 3"),
        (b"- 1\n", "expected a mapping of settings"),
        (None, "No such file or directory"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(tmp_path, content, says):
    file = tmp_path / "scale.yaml"
    if content:
        file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_yaml(file)
    assert str(error.value).startswith(f"{file}: ") and says in str(error.value)
    assert read_yaml(ROOT / "config/claims.yaml")  # merges and lists of mappings are no twice


def test_cut_table_of_published_values_is_named(tmp_path):
    text, file = (ROOT / "config/reported.csv").read_text(), tmp_path / "reported.csv"
    for cut, says in (
        (text[:-30], "row 417 is cut"),
        (text[:-1], "row 417 is cut"),
        ("", "column 'artifact' is missing"),
        (text.replace("value", "number", 1), "column 'value' is missing"),
    ):
        file.write_text(cut)
        with pytest.raises(ValueError, match=says) as error:
            read_reported(file)
        assert str(file) in str(error.value)


def test_several_runs_write_down_their_revisions(tmp_path, monkeypatch):
    script = (
        "import sys; from pathlib import Path; from mutor.models import hub\n"
        "hub.lock_file = lambda: Path(sys.argv[1])\n"
        "for n in range(20): hub.remember('model', f'a/{sys.argv[2]}-{n}', 'r')"
    )
    file = tmp_path / "revisions.json"
    command = [sys.executable, "-c", script, str(file)]
    writers = [
        subprocess.Popen([*command, str(n)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) for n in range(4)
    ]
    assert [w.wait() for w in writers] == [0] * 4
    assert len(json.loads(file.read_text())) == 80
    file.write_text("[]")
    monkeypatch.setattr(hub, "lock_file", lambda: file)
    with pytest.raises(ValueError, match="expected a mapping of repositories"):
        hub.known_revision("model", "a/0-0")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("writer", ["torch", "torch's stream", "safetensors", "text"])
def test_full_disk_is_one_line(monkeypatch, capsys, writer):
    def write(*_):
        if writer == "torch":
            torch.save(torch.ones(100000), "/dev/full")
        elif writer == "torch's stream":  # where the disk is full when it ends the file
            raise RuntimeError("basic_ios::clear: iostream error")
        elif writer == "safetensors":
            raise safetensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        else:
            with open("/dev/full", "w") as handle:
                handle.write("a" * 100000)

    monkeypatch.setattr("mutor.results.compare.lines", write)
    assert main(["compare", "a", "b"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "o space" in said
