"""What may be written in `@app.function(...)`, and what is said of everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from squall import Image, Retries, Secret
from squall.exception import InvalidError
from squall.options import read_options, secret_fields, with_secrets
from squall.protocol.messages import FunctionSpec, RetryPolicy

GOOD = [
    ({"cpu": 0.5}, {"cpu": 0.5, "cpu_limit": 0.0}),
    ({"cpu": (1, 2)}, {"cpu": 1.0, "cpu_limit": 2.0}),
    ({"memory": 512}, {"memory_mib": 512, "memory_limit_mib": 0}),
    ({"memory": (512, 1024)}, {"memory_mib": 512, "memory_limit_mib": 1024}),
    ({"gpu": "h100"}, {"gpu": ["H100"]}),
    ({"gpu": ["H100:2", "A100-80GB", "any"]}, {"gpu": ["H100:2", "A100-80GB", "any"]}),
    ({"timeout": 86_400}, {"timeout": 86_400.0}),
    ({"startup_timeout": 60}, {"startup_timeout": 60.0}),
    ({"startup_timeout": None}, {}),
    ({"retries": 3}, {"retries": RetryPolicy(3, 1.0, 1.0, 60.0)}),
    ({"retries": Retries(max_retries=2)}, {"retries": RetryPolicy(2, 2.0, 1.0, 60.0)}),
    ({"min_containers": 1, "max_containers": 2, "buffer_containers": 0}, None),
    ({"scaledown_window": 2}, {"scaledown_window": 2.0}),
    ({"single_use_containers": True}, {"single_use": True}),
    ({"block_network": True}, {"block_network": True}),
    ({"serialized": True, "name": "x", "include_source": None}, {}),
]


@pytest.mark.parametrize(("options", "fields"), GOOD)
def test_good_option_becomes_fields_of_the_spec(options: dict[str, Any], fields: dict[str, Any] | None) -> None:
    found = read_options(options)
    FunctionSpec("f", **{key: value for key, value in found.items() if not key.endswith("_env")})
    assert fields is None or found == fields


BAD: list[tuple[dict[str, Any], str]] = [
    ({"cpu": "two"}, "takes a number"),
    ({"cpu": 0}, "out of range"),
    ({"cpu": True}, "takes a number"),
    ({"cpu": float("nan")}, "takes a number"),
    ({"cpu": (2, 1)}, "limit is below its request"),
    ({"cpu": (1, 2, 3)}, "request, limit"),
    ({"memory": 1.5}, "takes a whole number"),
    ({"memory": -1}, "out of range"),
    ({"gpu": ""}, "names no GPU"),
    ({"gpu": "H100:0"}, "names no GPU"),
    ({"gpu": "H100:many"}, "names no GPU"),
    ({"gpu": ["H100", 2]}, "holds 2"),
    ({"gpu": []}, "in order of preference"),
    ({"timeout": None}, "takes a number"),
    ({"timeout": 0.5}, "from 1 to 86400"),
    ({"timeout": 86_401}, "from 1 to 86400"),
    ({"retries": -1}, "out of range"),
    ({"retries": "3"}, "squall.Retries"),
    ({"min_containers": 3, "max_containers": 2}, "more than `max_containers`"),
    ({"max_containers": 0}, "out of range"),
    ({"scaledown_window": 1}, "from 2 to 3600"),
    ({"serialized": "yes"}, "True or False"),
    ({"block_network": 1}, "True or False"),
    ({"image": "debian"}, "Image.host"),
    ({"secrets": Secret.from_dict({})}, "give a list"),
    ({"secrets": ["S"]}, "holds a `str`"),
    ({"env": ["A"]}, "takes a dict"),
    ({"name": "no spaces"}, "letters, digits"),
    ({"name": "x" * 65}, "1 to 64"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=lambda value: str(value))
def test_bad_option_is_named_with_what_it_takes(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidError) as error:
        read_options(options)
    assert said in str(error.value)


def test_misspelt_option_is_answered_with_the_right_one() -> None:
    with pytest.raises(InvalidError, match="did you mean `memory`"):
        read_options({"memroy": 128})


def test_unknown_option_is_answered_with_all_there_are() -> None:
    with pytest.raises(InvalidError, match="options: block_network, buffer_containers"):
        read_options({"zzz": 1})


@pytest.mark.parametrize("name", ["volumes", "region", "enable_memory_snapshot"])
def test_option_of_a_later_release_says_so(name: str) -> None:
    with pytest.raises(InvalidError, match=f"{name}=.*not available in this release"):
        read_options({name: object()})


@pytest.mark.parametrize(
    "values",
    [
        {"max_retries": 1, "backoff_coefficient": 0.5},
        {"max_retries": 1, "backoff_coefficient": 11},
        {"max_retries": 1, "initial_delay": -1},
        {"max_retries": 1, "max_delay": 61},
        {"max_retries": 1.5},
    ],
)
def test_retries_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidError, match="Retries"):
        Retries(**values)


# ---- secrets


def test_secret_skips_none_and_never_shows_its_values() -> None:
    secret = Secret.from_dict({"A": "hidden", "B": None})
    assert secret._values == {"A": "hidden"}
    assert "hidden" not in repr(secret)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"1A": "x"}, "cannot name an environment variable"),
        ({"A-B": "x"}, "cannot name an environment variable"),
        ({"SQUALL_TASK_ID": "x"}, "Squall's own"),
        ({"A": "x" * 32_769}, "32769 characters"),
        ({"A": "a\0b"}, "zero byte"),
        ({"A": 5}, "is a `int`"),
    ],
)
def test_secret_with_a_bad_key_or_value_is_refused_without_showing_it(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidError, match=said) as error:
        Secret.from_dict(values)
    assert "xxx" not in str(error.value)


def test_later_secrets_win() -> None:
    found = read_options({"secrets": [Secret.from_dict({"A": "1", "B": "1"}), Secret.from_dict({"A": "2"})]})
    assert found == {"secret_env": {"A": "2", "B": "1"}}


def test_secret_from_the_environment_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", "yes")
    assert Secret.from_local_environ(["THERE"])._values == {"THERE": "yes"}
    with pytest.raises(InvalidError, match="names `MISSING_ONE`"):
        Secret.from_local_environ(["THERE", "MISSING_ONE"])


def test_secret_from_dotenv_reads_the_nearest_file(tmp_path: Path) -> None:
    text = "# comment\n\nexport A=1\nB='two words' # why\nC=\"a\\nb\"\nD=plain # comment\nE=\n"
    (tmp_path / ".env").write_text(text)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    found = Secret.from_dotenv(tmp_path / "deep" / "er")._values
    assert found == {"A": "1", "B": "two words", "C": "a\nb", "D": "plain", "E": ""}


def test_missing_dotenv_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"no file `\.nothing-here`"):
        Secret.from_dotenv(tmp_path, filename=".nothing-here")


def test_dotenv_line_without_a_value_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("A=1\nnonsense\n")
    with pytest.raises(InvalidError, match="line 2"):
        Secret.from_dotenv(tmp_path)


def test_secret_by_name_sends_its_name_and_what_it_must_hold() -> None:
    secrets = [
        Secret.from_name("db", required_keys=["B", "A"]),
        Secret.from_dict({"X": "1"}),
        Secret.from_name("db", environment_name="dev"),
        Secret.from_name("db", required_keys="C"),
    ]
    assert secret_fields(secrets) == {
        "secret_env": {"X": "1"},
        "secrets": ["dev/db", "db"],
        "secret_keys": {"db": ["A", "B", "C"]},
    }
    assert repr(secrets[0]) == "<Secret.from_name('db')>"


def test_secrets_of_a_variant_come_after_those_of_its_function() -> None:
    below, fields = {"secrets": ["a", "b"], "secret_keys": {"a": ["X"]}}, {"secrets": ["a", "c"]}
    assert with_secrets(below, fields) == {"secrets": ["b", "a", "c"], "secret_keys": {"a": ["X"]}}
    assert with_secrets({}, {}) == {}


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", 3, None])
def test_secret_by_a_name_that_is_none_is_refused(name: Any) -> None:
    with pytest.raises(InvalidError, match="is not a name"):
        Secret.from_name(name)


# ---- images


def test_image_of_the_host_is_the_default_and_unknown_methods_are_named() -> None:
    assert Image.host()._spec.kind == "host"
    with pytest.raises(InvalidError, match=r"`Image\.from_registry` is not available"):
        Image.from_registry("python:3.11")
    with pytest.raises(AttributeError, match="no attribute `nonsense`"):
        Image.nonsense  # noqa: B018
