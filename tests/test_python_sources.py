"""The standard library's source files as a text: by one rule, apart by split, whole where they are not cut."""

import sysconfig
from pathlib import Path

import pytest

from mutor.checks import from_mapping
from mutor.tasks.corpora import CORPORA, Origin, problems
from mutor.tasks.python_sources import files, rows
from mutor.tasks.text import Text, TextConfig

OPTIONS = {"corpus": "python", "source": "installed", "tokens": "standin", "prefix_lm": False}


def test_splits_are_files_of_the_library():
    """All modules at its top without an underscore, each in one split, in the order of their names."""
    found = {split: [file.name for file in files(split)] for split in ("train", "valid", "test")}
    together = sorted(name for names in found.values() for name in names)
    assert together == sorted(p.name for p in Path(sysconfig.get_path("stdlib")).glob("*.py") if p.name[0] != "_")
    assert len(set(together)) == len(together) > 100 and {"abc.py"} == {found["test"][0]}
    assert all(names == sorted(names) for names in found.values())
    assert len(found["test"]) >= len(found["valid"]) >= len(together) // 10


def test_pieces_are_lines_of_a_file_in_order():
    """Of 64 lines at most, beginning with one that is not empty; only empty lines and short rests are left out."""
    left = {}
    for where, row in rows("test"):
        file, _, line = where.rpartition(":")
        text = Path(file).read_text(encoding="utf-8").split("\n")
        piece = row["text"].split("\n")
        assert (
            text[int(line) - 1 : int(line) - 1 + len(piece)][:-1] == piece[:-1]
            and piece[0].strip()
            and piece[-1].strip()
        )
        assert len(piece) <= 64
        done = left.setdefault(file, [line for line in text if line.strip()])
        mine = [line for line in piece if line.strip()]
        assert [line.rstrip() for line in done[: len(mine)]] == [line.rstrip() for line in mine]
        del done[: len(mine)]
    assert set(left) == {str(file) for file in files("test")} and all(len(rest) <= 2 for rest in left.values())
    lengths = {len(row["text"].split("\n")) for _, row in rows("train")}
    assert {4, 8, 16, 32, 64} <= lengths and max(lengths) == 64


def test_a_problem_is_what_follows_two_lines():
    found = problems(CORPORA["python"], "test", Origin("installed"), 20)
    for problem, (where, row) in zip(found, rows("test"), strict=False):
        assert problem.prompt + problem.answer == row["text"] and problem.prompt.count("\n") == 1
        assert problem.where == where and problem.gold and problem.answer.lstrip().startswith(problem.gold)


def test_contexts_of_two_sizes():
    """The same pieces, cut behind so many tokens."""
    short, long = (Text(TextConfig(**OPTIONS, valid_size=5, test_size=30, max_tokens=n)) for n in (64, 512))
    assert not short.prefix_lm and len(long.examples("test")) == 30
    assert max(len(ids) for ids, _ in short.examples("test")) == 64
    assert max(len(ids) for ids, _ in long.examples("test")) == 512
    starts = [ids[:64].tolist() for ids, prefix in long.examples("test") if prefix < 64]
    assert starts == [ids.tolist() for ids, _ in short.examples("test")]
    assert short.test_data_hash() == long.test_data_hash()
    assert short.train(0).size < long.train(0).size and short.train(0).dropped > long.train(0).dropped


@pytest.mark.parametrize(
    "options",
    [{"corpus": "python"}, {"corpus": "gsm8k", "source": "installed"}, {"corpus": "python", "source": "generated"}],
)
def test_they_come_from_python_alone(options):
    with pytest.raises(ValueError, match=r"source: '.*' does not go with corpus"):
        from_mapping(TextConfig, options, "datasets: x: options")


def test_one_token_a_byte():
    """As many tokens as bytes and one to begin with, all of them told apart; digits too, which BPE may not join."""
    tokenizer = Text(TextConfig(**{**OPTIONS, "tokens": "bytes", "test_size": 2, "valid_size": 2})).tokenizer
    text = "def f(x):\n\treturn 12 é\n"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 3 + 256 and ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode()) and len(set(ids)) == 1 + len(set(text.encode()))
    assert tokenizer.decode(ids[1:]) == text
