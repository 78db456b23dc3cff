"""Which openings the machine's configuration asks for, and that the rules say what the policy says."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from squall.node.egress import (
    DENIED,
    Opening,
    Uplink,
    configuration_files,
    endpoints_of,
    host_rules,
    policy_of_host,
    router_rules,
)
from squall.node.network import Pool


def endpoints(environ: dict[str, str], *files: Path) -> set[tuple[str, int]]:
    return {(host, port) for host, port, _ in endpoints_of(environ, files)}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HTTP_PROXY", "http://10.1.2.3:3128", ("10.1.2.3", 3128)),
        ("https_proxy", "proxy.corp:8080", ("proxy.corp", 8080)),
        ("ALL_PROXY", "socks5h://10.1.2.3", ("10.1.2.3", 1080)),
        ("PIP_INDEX_URL", "https://user:secret@pypi.corp/simple", ("pypi.corp", 443)),
        ("UV_DEFAULT_INDEX", "http://10.0.0.9/simple", ("10.0.0.9", 80)),
        ("UV_INDEX", "corp=https://a.corp:8443/x https://b.corp/y", ("a.corp", 8443)),
        ("PIP_EXTRA_INDEX_URL", "file:///srv/x https://c.corp", ("c.corp", 443)),
    ],
)
def test_setting_of_the_environment_names_an_endpoint(name: str, value: str, expected: tuple[str, int]) -> None:
    assert expected in endpoints({name: value})


@pytest.mark.parametrize("value", ["", "http://", "http://[bad", "http://x:notaport", "file:///srv", "http://x:99999"])
def test_setting_that_names_nothing_reachable_opens_nothing(value: str) -> None:
    assert endpoints({"HTTP_PROXY": value, "PIP_INDEX_URL": value}) == endpoints({})


def test_files_of_pip_and_uv_are_read_and_comments_are_not(tmp_path: Path) -> None:
    pip, uv = tmp_path / "pip.conf", tmp_path / "uv.toml"
    pip.write_text(
        "[global]\nindex-url = https://a.corp/simple\n  http://b.corp:81/x\n# https://no.corp\nproxy = c.corp:3128\n"
    )
    uv.write_text('[[index]]\nname = "x"\nurl = "https://d.corp:444/simple"\n')
    found = endpoints({}, pip, uv, tmp_path / "missing")
    assert {("a.corp", 443), ("b.corp", 81), ("c.corp", 3128), ("d.corp", 444)} <= found
    assert not any(host == "no.corp" for host, _ in found)


def test_configuration_files_follow_the_variables_that_move_them() -> None:
    files = configuration_files(Path("/h"), Path("/venv"), {"XDG_CONFIG_HOME": "/x", "PIP_CONFIG_FILE": "/p.conf"})
    assert {Path("/x/pip/pip.conf"), Path("/p.conf"), Path("/venv/pip.conf"), Path("/etc/pip.conf")} <= set(files)


def test_proxy_at_loopback_is_a_warning_and_no_opening() -> None:
    environ = {"HTTPS_PROXY": "http://127.0.0.1:3128", "HTTP_PROXY": "http://10.1.2.3:3128"}
    policy = asyncio.run(policy_of_host(environ, []))
    assert [opening.address for opening in policy.openings if opening.port == 3128] == [IPv4Address("10.1.2.3")]
    (warning,) = policy.warnings
    assert warning.startswith("HTTPS_PROXY names 127.0.0.1:3128")


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_opening_has_a_port(port: int) -> None:
    with pytest.raises(ValueError, match="is no port"):
        Opening(IPv4Address("10.0.0.1"), port, "test")


def test_router_denies_every_private_range_and_opens_before_it_denies() -> None:
    rules = router_rules(IPv4Network("100.112.0.0/14"), [Opening(IPv4Address("10.0.0.1"), 3128, "test")])
    opened = next(n for n, rule in enumerate(rules) if "10.0.0.1 . 3128" in rule)
    denied = next(n for n, rule in enumerate(rules) if all(str(network) in rule for network in DENIED))
    assert opened < denied
    for chain in ("arriving", "own", "through"):
        assert any(f"add chain inet squall {chain} " in rule and "policy drop" in rule for rule in rules)


def test_table_on_the_host_judges_nothing_but_the_uplinks_packets() -> None:
    uplink = Uplink("sq1", "squall_1", IPv4Address("100.64.0.1"), IPv4Address("100.64.0.2"))
    for rule in host_rules(uplink, [], []):
        if rule.startswith("add rule ip squall_1 through"):
            assert "sq1" in rule
    guarded = host_rules(uplink, [], ["eth0"])
    assert any('iifname "eth0" ct state new ct status != dnat drop' in rule for rule in guarded)


def test_pool_keeps_a_few_and_grows_while_somebody_finds_it_empty() -> None:
    pool = Pool(8)
    assert pool.wanted(ready=0, waiting=0) == 8
    assert pool.wanted(ready=7, waiting=0) == 0, "one missing is no reason to start"
    assert pool.wanted(ready=7, waiting=1) == 2
    for _ in range(10):
        pool.ask(ready=0)
    assert pool.target == Pool.MOST


def test_pool_shrinks_when_it_is_quiet_and_ends_when_nobody_asks() -> None:
    pool = Pool(8)
    for _ in range(10):
        pool.ask(ready=0)
    pool.tick()
    pool.tick()
    assert pool.target == Pool.MOST // 2 and pool.surplus(ready=Pool.MOST) == Pool.MOST // 2
    for _ in range(Pool.IDLE_TICKS):
        pool.tick()
    assert pool.target == 0 and pool.wanted(ready=0, waiting=0) == 0
    pool.ask(ready=0)
    assert pool.target >= 8
