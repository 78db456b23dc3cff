"""What of this machine's configuration holds in images."""

from __future__ import annotations

from pathlib import Path

import pytest

from squall.node import settings
from squall.node.settings import CERTIFICATES, HostSettings, debian_uris


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without files of its own."""
    monkeypatch.setattr(settings, "_SYSTEM_BUNDLES", ())
    monkeypatch.setattr(settings, "_apt_sources", list)
    monkeypatch.setattr(settings, "_apt_proxies", lambda: "")
    monkeypatch.setattr(settings, "_pip_files", lambda env, home: [home / "pip.conf"])


def read(home: Path, **env: str) -> HostSettings:
    return HostSettings.read({"SQUALL_HOME": str(home), **env}, home)


def test_certificates_are_shown_at_a_place_of_their_own(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.touch()
    found = read(tmp_path, SSL_CERT_FILE=str(bundle))
    assert (str(bundle), CERTIFICATES) in found.mounts
    assert found.environment["REQUESTS_CA_BUNDLE"] == CERTIFICATES
    assert CERTIFICATES in found.apt


def test_proxies_are_passed_on_and_nothing_else_is(tmp_path: Path) -> None:
    found = read(tmp_path, https_proxy="http://p:1", NO_PROXY="x", AWS_SECRET_ACCESS_KEY="s", UV_PYTHON="/x")
    assert found.environment["https_proxy"] == "http://p:1"
    assert found.environment["NO_PROXY"] == "x"
    assert not {"AWS_SECRET_ACCESS_KEY", "UV_PYTHON"} & set(found.environment)


def test_pips_settings_are_told_to_uv(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://i.example/simple\nextra-index-url =\n  https://a.example\n  https://b.example\n"
        "find-links = https://w.example\ntrusted-host = i.example\n[install]\nno-index = true\n"
    )
    env = read(tmp_path).environment
    assert env["UV_DEFAULT_INDEX"] == env["PIP_INDEX_URL"] == "https://i.example/simple"
    assert env["UV_EXTRA_INDEX_URL"] == "https://a.example https://b.example"
    assert env["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert (env["UV_FIND_LINKS"], env["UV_INSECURE_HOST"], env["UV_NO_INDEX"]) == (
        "https://w.example",
        "i.example",
        "1",
    )


def test_variables_win_over_pips_files_and_uvs_own_over_both(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://file.example\n")
    env = read(tmp_path, PIP_INDEX_URL="https://variable.example", UV_DEFAULT_INDEX="https://uv.example").environment
    assert env["PIP_INDEX_URL"] == "https://variable.example"
    assert env["UV_DEFAULT_INDEX"] == "https://uv.example"


def test_local_index_is_shown_with_the_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "index/simple").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    found = read(tmp_path, PIP_EXTRA_INDEX_URL=f"file://{tmp_path}/index/simple", PIP_FIND_LINKS=f"{tmp_path}/wheels")
    shown = [path for path, target in found.mounts if path == target]
    assert shown == [f"{tmp_path}/index", f"{tmp_path}/wheels"]


@pytest.mark.parametrize("path", ["/", "/home", "/root", "/simple"])
def test_too_much_is_never_shown(tmp_path: Path, path: str) -> None:
    assert read(tmp_path, PIP_FIND_LINKS=path).mounts == []


def test_broken_configuration_of_pip_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("index-url = without a section")
    assert "PIP_INDEX_URL" not in read(tmp_path).environment


def test_mirror_is_found_in_both_forms_of_sources() -> None:
    lines = "deb [arch=amd64 signed-by=/k] http://one.example/debian bookworm main # why\n# deb http://no.example x y\n"
    stanza = "Types: deb\nURIs: https://two.example/debian-security\nSuites: x\n"
    assert debian_uris([lines, stanza]) == ["https://two.example/debian-security", "http://one.example/debian"]


def test_mirror_of_this_machine_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uris = ("http://m.example/debian", "http://s.example/debian-security", "http://other.example")
    text = "".join(f"deb {uri} x main\n" for uri in uris)
    monkeypatch.setattr(settings, "_apt_sources", lambda: [text])
    found = read(tmp_path)
    assert (found.mirror, found.security) == ("http://m.example/debian", "http://s.example/debian-security")


def test_configured_mirror_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "_apt_sources", lambda: ["deb http://m.example/debian x main"])
    monkeypatch.setenv("SQUALL_DEBIAN_MIRROR", "https://c.example/debian/")
    found = read(tmp_path)
    assert (found.mirror, found.security) == ("https://c.example/debian", "https://c.example/debian-security")
