"""What this machine is configured with and images need too: certificates, proxies, package indexes, Debian mirror.

Read once, when the first image is wanted. pip's files are read and told to uv as well, with pip's rule that of all
indexes the best version wins. What lies on this machine's disk (`file:` indexes, find-links, constraints, the bundle
of certificates) is listed with the place it is shown at, read-only, in builds and in containers of images. Must never
show a directory that holds more than packages. Tested in `tests/unit/test_host_settings.py`.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from squall import config
from squall._observe import Logger
from squall.node.rootfs import _NEVER, INSIDE

CERTIFICATES = f"{INSIDE}/certificates.pem"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
DEFAULT_SECURITY = "http://deb.debian.org/debian-security"
_APT_TIMEOUT = 5.0
_BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT")
_SYSTEM_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_UV_PASSED = (
    "UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_INDEX", "UV_FIND_LINKS", "UV_NO_INDEX",
    "UV_CONSTRAINT", "UV_INSECURE_HOST", "UV_HTTP_TIMEOUT", "UV_INDEX_STRATEGY", "UV_NATIVE_TLS", "UV_EXCLUDE_NEWER",
    "UV_PRERELEASE", "UV_CONCURRENT_DOWNLOADS",
)  # fmt: skip
_log = Logger("settings")


@dataclass
class HostSettings:
    mounts: list[tuple[str, str]] = field(default_factory=list)
    """Path on this machine, path in the container; all read-only."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of builds and of containers."""
    mirror: str = DEFAULT_MIRROR
    security: str = DEFAULT_SECURITY
    apt: str = ""
    """Lines for apt's configuration in builds: proxies and the certificates."""

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None, home: Path | None = None) -> HostSettings:
        env = dict(os.environ if environ is None else environ)
        settings = cls()
        pip = _read_pip(env, home or Path.home())
        settings._take_certificates(env, pip.get("cert", ""))
        settings._take_proxies(env, pip.get("proxy", ""))
        settings._take_indexes(env, pip)
        settings._take_debian()
        return settings

    # -- certificates, proxies

    def _take_certificates(self, env: Mapping[str, str], pip_cert: str) -> None:
        named = [env.get(name, "") for name in _BUNDLES]
        for path in (*named, pip_cert, *_SYSTEM_BUNDLES):
            real = os.path.realpath(path) if path else ""
            if real and os.path.isfile(real):
                self.mounts.append((real, CERTIFICATES))
                self.environment.update(dict.fromkeys(_BUNDLES, CERTIFICATES))
                self.apt += f'Acquire::https::CaInfo "{CERTIFICATES}";\n'
                return

    def _take_proxies(self, env: Mapping[str, str], pip_proxy: str) -> None:
        self.environment.update({name: value for name, value in env.items() if name.lower().endswith("_proxy")})
        if pip_proxy:
            self.environment.setdefault("PIP_PROXY", pip_proxy)

    # -- packages

    def _take_indexes(self, env: Mapping[str, str], pip: Mapping[str, str]) -> None:
        for name in ("index-url", "extra-index-url", "find-links", "trusted-host", "timeout", "no-index", "constraint"):
            if value := " ".join(pip.get(name, "").split()):
                self.environment[f"PIP_{name.upper().replace('-', '_')}"] = value
        self.environment.update({name: env[name] for name in _UV_PASSED if env.get(name)})
        for name, value in _told_to_uv(pip).items():
            self.environment.setdefault(name, value)
        for name in ("INDEX_URL", "EXTRA_INDEX_URL", "DEFAULT_INDEX", "INDEX", "FIND_LINKS", "CONSTRAINT"):
            for variable in (f"PIP_{name}", f"UV_{name}"):
                self._show_local(self.environment.get(variable, ""))
        self.environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        self.environment["PIP_ROOT_USER_ACTION"] = "ignore"

    def _show_local(self, value: str) -> None:
        for word in re.split(r"[\s,]+", value):
            path = _local_path(word.partition("=")[2] if "=file:" in word else word)
            if not path or not os.path.exists(path):
                continue
            # An index's pages point at files beside it.
            shown = os.path.dirname(path) if os.path.basename(path) == "simple" else path
            if shown in _NEVER:
                _log.warning("a local package index is not shown to images: too much would be", path=shown)
            elif (shown, shown) not in self.mounts:
                self.mounts.append((shown, shown))

    # -- Debian

    def _take_debian(self) -> None:
        configured = config.load().debian_mirror
        found = [configured] if configured else debian_uris(_apt_sources())
        for uri in found:
            if uri.rstrip("/").endswith("debian-security"):
                self.security = uri.rstrip("/")
            elif uri.rstrip("/").endswith("debian"):
                self.mirror = uri.rstrip("/")
        if configured and self.security == DEFAULT_SECURITY and self.mirror.endswith("/debian"):
            self.security = f"{self.mirror}-security"
        self.apt += _apt_proxies()


def _local_path(word: str) -> str:
    parts = urlsplit(word)
    if parts.scheme == "file":
        return os.path.normpath(unquote(parts.path))
    return os.path.normpath(os.path.expanduser(word)) if not parts.scheme and word.startswith(("/", "~")) else ""


def _pip_files(env: Mapping[str, str], home: Path) -> list[Path]:
    if env.get("PIP_CONFIG_FILE"):
        return [Path(env["PIP_CONFIG_FILE"])]
    xdg = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), home / ".pip/pip.conf", xdg / "pip/pip.conf"]
    return [*files, Path(sys.prefix, "pip.conf")]


def _read_pip(env: Mapping[str, str], home: Path) -> dict[str, str]:
    """pip's settings, as pip orders them: of the machine, of the user, of the environment, then variables."""
    found: dict[str, str] = {}
    for file in _pip_files(env, home):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            _log.warning("pip's configuration cannot be read", file=str(file), error=str(error))
            continue
        for section in ("global", "install"):
            if parser.has_section(section):
                found.update({name.replace("_", "-"): value for name, value in parser.items(section)})
    for name, value in env.items():
        if name.startswith("PIP_") and value:
            found[name[4:].lower().replace("_", "-")] = value
    return found


def _told_to_uv(pip: Mapping[str, str]) -> dict[str, str]:
    said: dict[str, str] = {}
    if index := pip.get("index-url", "").strip():
        said["UV_DEFAULT_INDEX"] = index
    if extra := pip.get("extra-index-url", "").split():
        said["UV_EXTRA_INDEX_URL"] = " ".join(extra)
        said["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip's rule
    if links := pip.get("find-links", "").split():
        said["UV_FIND_LINKS"] = ",".join(links)
    if hosts := pip.get("trusted-host", "").split():
        said["UV_INSECURE_HOST"] = " ".join(hosts)
    if constraints := pip.get("constraint", "").split():
        said["UV_CONSTRAINT"] = " ".join(constraints)
    if pip.get("no-index", "").strip().lower() in ("1", "true", "yes", "on"):
        said["UV_NO_INDEX"] = "1"
    return said


def _apt_sources() -> Iterable[str]:
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.*"))]
    for file in files:
        try:
            yield file.read_text("utf-8", "replace")
        except OSError:
            continue


def debian_uris(texts: Iterable[str]) -> list[str]:
    """The URIs of sources, in either of apt's forms, the last first, so that the first wins where one is taken."""
    found = []
    for text in texts:
        for line in text.splitlines():
            line = line.strip()
            if line.startswith("URIs:"):
                found += line[5:].split()
            elif line.startswith("deb "):
                words = shlex.split(re.sub(r"\[[^]]*\]", "", line), comments=True)
                found += words[1:2]
    return [uri for uri in reversed(found) if uri.startswith(("http://", "https://"))]


def _apt_proxies() -> str:
    """apt's own proxies, as it tells them; nothing where there is no apt."""
    command = ["apt-config", "dump", "--format", '%F "%v";%n', "Acquire::http", "Acquire::https"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_APT_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line for line in run.stdout.splitlines() if "proxy" in line.lower() and '""' not in line]
    return "".join(f"{line}\n" for line in lines)
