"""What a user writes wrongly is refused with the key, the value and what is allowed."""

from dataclasses import dataclass

import pytest
from mutor.baselines.parallel_mtp import ParallelMTPConfig

from mutor.checks import choose, from_mapping, not_default, setting
from mutor.mtp.mutor import MuToR, MuToRConfig
from mutor.registry import METHODS, load, register


@dataclass(frozen=True)
class Everything:
    """One setting of each kind."""

    steps: int = setting(doc="no default")
    rate: float = setting(1e-3, doc="a rate", low=0, high=1, open_ends=True)
    name: str = setting("x", doc="one of two", choices=("x", "y"))
    flag: bool = setting(False, doc="a flag")
    betas: tuple[float, ...] = setting((0.9, 0.99), doc="each inside", low=0, high=1)
    limit: int | None = setting(None, doc="may be missing", low=1)
    extra: dict[str, int] = setting({}, doc="a mapping")


@pytest.mark.parametrize(
    ("key", "nearest"), [("d_mx", "d_max"), ("register", "registers"), ("dmin", "d_min"), ("ofsets", "offsets")]
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    """A misspelt key is never silently ignored."""
    with pytest.raises(
        ValueError, match=rf"here: unknown key '{key}', did you mean '{nearest}'\?.*Known keys: a, a_schedule, d_max"
    ):
        from_mapping(MuToRConfig, {key: 2}, "here")


def test_a_key_near_nothing_lists_the_known_ones():
    """Without a near key the hint is left out."""
    with pytest.raises(ValueError, match=r"unknown key 'zzzzzz'\. Known keys: a, a_schedule, d_max") as error:
        MuToR.of(zzzzzz=1)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"a": 0}, ["a", "0.0", "(0, 1)"]),
        ({"a": 1.0}, ["a", "1.0", "(0, 1)"]),
        ({"a": -0.1}, ["a", "-0.1", "(0, 1)"]),
        ({"a": float("nan")}, ["a", "nan", "(0, 1)"]),
        ({"d_max": 0}, ["d_max", "0", "[1, inf]"]),
        ({"d_min": 0}, ["d_min", "0", "[1, inf]"]),
        ({"d_max": 2, "d_min": 3}, ["d_max", "2", "3", "d_max >= d_min"]),
        ({"d_max": "4"}, ["d_max", "'4'", "int"]),
        ({"d_max": 4.0}, ["d_max", "4.0", "int"]),
        ({"d_max": True}, ["d_max", "True", "int"]),
        ({"d_max": None}, ["d_max", "None", "int"]),
        ({"a": "much"}, ["a", "'much'", "a number"]),
        ({"offsets": "sequences"}, ["offsets", "'sequences'", "sequence, mixed, all"]),
        ({"register_scaled": 1}, ["register_scaled", "1", "bool"]),
        ({"registers": 2}, ["registers", "2", "placement"]),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(settings, words):
    """Ranges, types and choices."""
    with pytest.raises(ValueError) as error:
        MuToR.of(**settings)
    for word in ["mutor", *words]:
        assert word in str(error.value)


def test_the_range_of_the_baselines():
    """One head more than next-token at least."""
    with pytest.raises(ValueError, match=r"d_max.*1.*\[2, inf\]"):
        from_mapping(ParallelMTPConfig, {"d_max": 1}, "parallel_mtp")


def test_good_values_arrive_with_their_types():
    """YAML's 1e-3 is text, its lists become tuples, integers become floats."""
    got = from_mapping(Everything, {"steps": 3, "rate": "1e-2", "betas": [0, 1.0], "limit": 5, "flag": True}, "run")
    assert (got.steps, got.rate, got.betas, got.limit, got.flag) == (3, 0.01, (0, 1.0), 5, True)
    assert from_mapping(Everything, {"steps": 3, "limit": None}, "run").limit is None
    assert not_default(MuToRConfig(d_max=6, a=0.3, placement="every", registers=2)) == {
        "d_max": 6,
        "placement": "every",
        "registers": 2,
    }
    assert list(not_default(MuToRConfig(registers=2, placement="every", a=0.1))) == ["a", "placement", "registers"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "run: missing key 'steps': no default"),
        ({"steps": 1, "betas": [0.5, 1.5]}, "betas: 1.5 is out of range"),
        ({"steps": 1, "betas": ["a", 1]}, "betas: 'a' is not a number"),
        ({"steps": 1, "betas": 1}, "betas: 1 is not a list"),
        ({"steps": 1, "limit": 0}, "limit: 0 is out of range"),
        ({"steps": 1, "name": "z"}, "name: 'z' is not allowed; allowed: x, y"),
        ({"steps": 1, "extra": [1]}, "extra: [1] is not a mapping"),
        ([1, 2], "expected a mapping of settings"),
    ],
)
def test_other_refusals(values, words):
    """Missing keys, values in tuples, not a mapping at all."""
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        from_mapping(Everything, values, "run")


def test_defaults_are_not_shared():
    """A mutable default is a copy for each config."""
    first = from_mapping(Everything, {"steps": 1}, "run")
    first.extra["x"] = 1
    assert from_mapping(Everything, {"steps": 1}, "run").extra == {}


@pytest.mark.parametrize(
    ("name", "nearest"), [("mutr", "mutor"), ("parallel_mpt", "parallel_mtp"), ("nexttoken", "next_token")]
)
def test_an_unknown_method_suggests_the_nearest(name, nearest):
    """The registry answers a misspelt name."""
    with pytest.raises(ValueError, match=f"method: '{name}' is unknown, did you mean '{nearest}'.*teacherless"):
        load(METHODS, name, "method")


def test_a_taken_name_is_refused():
    """Registering twice would silently replace a method."""
    mine = {"mutor": "mutor.mtp.mutor:MuToR"}
    with pytest.raises(ValueError, match=r"'mutor' is already registered as mutor\.mtp\.mutor:MuToR"):
        register(mine, "mutor", "other:Thing")
    assert mine == {"mutor": "mutor.mtp.mutor:MuToR"}


@pytest.mark.parametrize("name", ["next_token", "parallel_mtp", "sequential_mtp", "teacherless", "mutor"])
def test_every_name_of_the_contract_loads(name):
    """Each has a Config whose defaults pass its own checks."""
    method = load(METHODS, name, "method")
    assert not_default(from_mapping(method.Config, {}, name)) == {}


def test_choose_returns_what_is_allowed():
    """Also from any iterable."""
    assert choose("b", iter(["a", "b"]), "letter") == "b"
