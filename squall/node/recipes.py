"""What each kind of image step runs, as commands and the files they read. Pure text; nothing is run here.

Everything a step shows to its command lies in `INPUTS`, read-only, or in `CACHE`, which all builds of a workspace
share and may write to. Values that a user gave are quoted or lie in files, never spliced into a script bare.
Tested in `tests/unit/test_recipes.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from squall import config
from squall.exception import InvalidError
from squall.node.rootfs import INSIDE
from squall.node.settings import HostSettings
from squall.protocol.images import Settings, token_of
from squall.protocol.messages import ImageStep

INPUTS = f"{INSIDE}/inputs"
CACHE = f"{INSIDE}/cache"
UV = f"{INSIDE}/uv"
OUT = "/out"
"""Where the first half of a base leaves the files, in the root of `Image.host()`."""


@dataclass
class Recipe:
    command: list[str]
    inputs: dict[str, str] = field(default_factory=dict)
    """Name -> text of files to show at INPUTS."""
    environment: dict[str, str] = field(default_factory=dict)
    on_host: bool = False
    """Run in the root of `Image.host()`, and take OUT as the layer."""


def script(*lines: str) -> list[str]:
    return ["/bin/sh", "-ec", "\n".join(lines)]


def recipe_of(step: ImageStep, settings: Settings, host: HostSettings) -> Recipe:
    """How to carry a step out."""
    recipe: Recipe = _RECIPES[step.kind](step.args, settings, host)
    own = {str(name): str(value) for name, value in step.args.get("env", {}).items()}
    recipe.environment = {**_COMMON, **host.environment, **settings.env, **own, **recipe.environment}
    return recipe


_COMMON = {
    "DEBIAN_FRONTEND": "noninteractive",
    "TERM": "dumb",
    "UV_CACHE_DIR": f"{CACHE}/uv",
    "UV_LINK_MODE": "copy",  # the cache is another mount than the layer
    "UV_PYTHON_DOWNLOADS": "never",
    "UV_BREAK_SYSTEM_PACKAGES": "1",
    "PIP_BREAK_SYSTEM_PACKAGES": "1",
    "PIP_CACHE_DIR": f"{CACHE}/pip",
    "PYTHONDONTWRITEBYTECODE": "1",  # `bytecode` writes it, in a form that does not depend on times
}


# ---- commands of the user's ---------------------------------------------------------------------------------------


def _run(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    commands = [str(command) for command in args["commands"]]
    if len(commands) == 1:
        return Recipe([*settings.shell, commands[0]], _apt_inputs(host), {"APT_CONFIG": f"{INPUTS}/apt.conf"})
    shell = shlex.join(settings.shell)
    lines = [f"{shell} {shlex.quote(command)}" for command in commands]
    return Recipe(script(*lines), _apt_inputs(host), {"APT_CONFIG": f"{INPUTS}/apt.conf"})


def _apt_inputs(host: HostSettings) -> dict[str, str]:
    return {"apt.conf": f'{host.apt}APT::Install-Recommends "false";\nAcquire::Retries "3";\n{_UNSAFE_IO}'}


_UNSAFE_IO = 'Dpkg::Options { "--force-unsafe-io"; "--force-confdef"; "--force-confold"; };\n'
"""Nothing is read back after a crash: a layer is whole or gone."""


def _apt(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    packages = shlex.join(args["packages"])
    lines = [
        f"mkdir -p {CACHE}/apt/archives/partial",
        "apt-get -qq update",
        f"apt-get -qq -y -o Dir::Cache::archives={CACHE}/apt/archives --no-install-recommends install {packages}",
        "rm -rf /var/lib/apt/lists/*",
    ]
    inputs = _apt_inputs(host)
    inputs["apt.conf"] += 'APT::Sandbox::User "root";\nAPT::Keep-Downloaded-Packages "true";\n'
    return Recipe(script(*lines), inputs, {"APT_CONFIG": f"{INPUTS}/apt.conf"})


# ---- Python packages ----------------------------------------------------------------------------------------------


def _options(args: Mapping[str, Any], *, uv: bool) -> list[str]:
    options: Mapping[str, Any] = args.get("options", {})
    words = []
    for name in ("index_url", "extra_index_url", "find_links"):
        if value := options.get(name):
            words += [f"--{name.replace('_', '-')}", value]
    if uv and options.get("extra_index_url"):
        words += ["--index-strategy", "unsafe-best-match"]
    if options.get("pre"):
        words += ["--prerelease", "allow"] if uv else ["--pre"]
    return words + shlex.split(options.get("extra_options", ""))


_COMPILE = f"exec python3 {INSIDE}/lib/squall/runner/bytecode.py {CACHE}/bytecode"


def _uv(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    words = [UV, "pip", "install", "--system", "--quiet", *_options(args, uv=True)]
    return _install(words, args)


def _pip(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    words = ["python3", "-m", "pip", "install", "--no-compile", "--progress-bar", "off", *_options(args, uv=False)]
    return _install(words, args)


def _install(words: list[str], args: Mapping[str, Any]) -> Recipe:
    inputs = {}
    if args.get("requirements"):
        inputs["requirements.txt"] = args["requirements"]
        words += ["-r", f"{INPUTS}/requirements.txt"]
    packages = ["--", *args["packages"]] if args.get("packages") else []
    return Recipe(script(shlex.join([*words, *packages]), _COMPILE), inputs)


def _uv_sync(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    options: Mapping[str, Any] = args.get("options", {})
    words = [UV, "export", "--quiet", "--no-emit-project", "--no-dev", "--format", "requirements-txt"]
    words += ["--frozen"] if options.get("frozen", True) and args.get("lock") else []
    for group in options.get("groups", []):
        words += ["--group", group]
    for extra in options.get("extras", []):
        words += ["--extra", extra]
    words += ["--output-file", "/tmp/squall-requirements.txt", *shlex.split(options.get("extra_options", ""))]
    install = [UV, "pip", "install", "--system", "--quiet", "-r", "/tmp/squall-requirements.txt"]
    lines = [
        f"cp -R {INPUTS} /tmp/squall-project && cd /tmp/squall-project",
        f"{shlex.join(words)} > /dev/null",
        shlex.join(install),
        "cd / && rm -rf /tmp/squall-project /tmp/squall-requirements.txt",
        _COMPILE,
    ]
    inputs = {"pyproject.toml": args["pyproject"], **({"uv.lock": args["lock"]} if args.get("lock") else {})}
    return Recipe(script(*lines), inputs)


def _poetry(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    """By what poetry itself exports from its lock; poetry lives in a place of its own and leaves nothing behind."""
    options: Mapping[str, Any] = args.get("options", {})
    version = options.get("version", "latest")
    poetry = [UV, "tool", "run", "--quiet", "--from", "poetry" if version == "latest" else f"poetry=={version}"]
    poetry += ["--with", "poetry-plugin-export", "poetry", "--no-interaction"]
    export = [*poetry, "export", "--format", "requirements.txt", "--output", "/tmp/squall-requirements.txt"]
    for name, groups in _poetry_groups(args["pyproject"], options).items():
        export += [f"--{name}", ",".join(groups)] if groups else []
    install = [UV, "pip", "install", "--system", "--quiet", "-r", "/tmp/squall-requirements.txt"]
    lines = [
        f"cp -R {INPUTS} /tmp/squall-project && cd /tmp/squall-project",
        *([] if args.get("lock") else [f"{shlex.join([*poetry, 'lock'])} > /dev/null"]),
        f"{shlex.join(export)} > /dev/null",
        shlex.join(install),
        "cd / && rm -rf /tmp/squall-project /tmp/squall-requirements.txt",
        _COMPILE,
    ]
    inputs = {"pyproject.toml": args["pyproject"], **({"poetry.lock": args["lock"]} if args.get("lock") else {})}
    home = {"HOME": "/tmp/squall-home", "POETRY_CACHE_DIR": f"{CACHE}/poetry"}
    return Recipe(script(*lines), inputs, home)


def _poetry_groups(pyproject: str, options: Mapping[str, Any]) -> dict[str, list[str]]:
    """What to export so that it is what `poetry install` installs: without a word, all groups but the optional ones."""
    if options.get("only"):
        return {"only": options["only"]}
    try:
        said = config.parse_toml(pyproject)
    except ValueError as error:
        raise InvalidError(f"cannot read the `pyproject.toml` of a Poetry project: {error}") from None
    tool = said.get("tool", {}).get("poetry", {})
    groups = {**{name: {} for name in said.get("dependency-groups", {})}, **tool.get("group", {})}
    groups |= {"dev": {}} if "dev-dependencies" in tool else {}
    wanted = [name for name, group in groups.items() if not group.get("optional")]
    without = options.get("without", [])
    wanted = [name for name in dict.fromkeys([*wanted, *options.get("with", [])]) if name not in without]
    return {"with": wanted, "without": [name for name in without if name in ("main", *groups)]}


_GIT_HELPER = 'f() { test "$1" != get || printf "username=%s\\npassword=%s\\n" "$SQUALL_GIT_USER" "$%s"; }; f'


def _private(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    """git asks a helper for the token, each host for its own: it is on no command line, in no URL and in no file."""
    hosts = dict(token_of(repository) for repository in args["repositories"])
    environment = {"SQUALL_GIT_USER": args["git_user"], "GIT_TERMINAL_PROMPT": "0"}
    environment["GIT_CONFIG_COUNT"] = str(len(hosts))
    for number, (name, token) in enumerate(sorted(hosts.items())):
        environment[f"GIT_CONFIG_KEY_{number}"] = f"credential.https://{name}.helper"
        environment[f"GIT_CONFIG_VALUE_{number}"] = "!" + _GIT_HELPER.replace("$%s", f"${token}")
    words = ["python3", "-m", "pip", "install", "--no-compile", "--progress-bar", "off", *_options(args, uv=False)]
    words += ["--", *(f"git+https://{repository}" for repository in args["repositories"])]
    apt = _apt({"packages": ["git"]}, settings, host)
    lines = [f"command -v git > /dev/null || {shlex.join(apt.command)}", shlex.join(words), _COMPILE]
    return Recipe(script(*lines), apt.inputs, {**apt.environment, **environment})


# ---- files, functions ---------------------------------------------------------------------------------------------


def _copy(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    """By a command inside, as links of the layers below may lie on the way to the target."""
    target = shlex.quote(args["target"])
    return Recipe(script(f"mkdir -p {target}", f"cp -R --preserve=mode {INPUTS}/files/. {target}/"))


def _function(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    return Recipe(["python3", f"{INSIDE}/lib/squall/runner/build.py", INPUTS])


# ---- the base -----------------------------------------------------------------------------------------------------

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_PACKAGES = "apt ca-certificates python3 python3-pip python3-venv"


def base_files(step: ImageStep, host: HostSettings) -> Recipe:
    """The first half: apt of this machine, in a container, works out and fetches the packages, whose files are
    unpacked, with nothing of them run."""
    suite = step.args["suite"]
    sources = _sources(suite, host)
    lines = [
        f"test -e {KEYRING} || {{ echo 'the node lacks {KEYRING}'; exit 3; }}",
        "for tool in apt-get dpkg-deb tar; do",
        "  command -v $tool > /dev/null || { echo the node lacks $tool; exit 3; }",
        "done",
        "a=/tmp/apt; mkdir -p $a/lists/partial $a/archives/partial $a/etc",
        ": > $a/status",
        f"cp {INPUTS}/sources.list {INPUTS}/apt.conf $a/etc/",
        "apt-get -qq update",  # to which a mirror that is not there is worth a warning
        "ls $a/lists/*Packages* > /dev/null 2>&1 || { echo 'no list of packages was fetched'; exit 3; }",
        "mkdir -p $a/essential/partial",
        "apt-get -qq -y -o Dir::Cache::archives=$a/essential --download-only install '?essential'",
        "cp $a/essential/*.deb $a/archives/",
        f"apt-get -qq -y --download-only install '?essential' {_PACKAGES}",
        f"mkdir -p {OUT} && cd {OUT}",
        "for d in bin sbin lib lib64; do mkdir -p usr/$d; ln -s usr/$d $d; done",
        # What is unpacked follows the links just made. Only what dpkg itself needs: it unpacks the rest.
        "for deb in $a/essential/*.deb; do dpkg-deb --fsys-tarfile $deb > $a/files.tar"
        " && tar -x --keep-directory-symlink -f $a/files.tar; done",
        "mkdir -p var/cache/squall && mv $a/archives/*.deb var/cache/squall/",
        "rm -f etc/apt/sources.list; mkdir -p etc/apt/sources.list.d",
        f"cp {INPUTS}/sources.list etc/apt/sources.list.d/debian.list",
    ]
    conf = (
        f'{host.apt}Dir::State::status "/tmp/apt/status";\nDir::State::lists "/tmp/apt/lists";\n'
        'Dir::Etc::main "/dev/null";\nDir::Etc::parts "/dev/null";\n'
        'Dir::Cache "/tmp/apt";\nDir::Etc::sourcelist "/tmp/apt/etc/sources.list";\n'
        'Dir::Etc::sourceparts "/dev/null";\n'
        'Dir::Etc::preferencesparts "/dev/null";\nDir::Log "/tmp/apt";\nAPT::Install-Recommends "false";\n'
        'Acquire::Languages "none";\nAcquire::Retries "3";\nAPT::Sandbox::User "root";\n'
    )
    recipe = Recipe(script(*lines), {"sources.list": sources, "apt.conf": conf}, on_host=True)
    recipe.environment = {**host.environment, "APT_CONFIG": f"{INPUTS}/apt.conf"}
    return recipe


def _sources(suite: str, host: HostSettings) -> str:
    rows = [(host.mirror, suite), (host.mirror, f"{suite}-updates"), (host.security, f"{suite}-security")]
    return "".join(f"deb [signed-by={KEYRING}] {uri} {name} main\n" for uri, name in rows)


def _debian(args: Mapping[str, Any], settings: Settings, host: HostSettings) -> Recipe:
    """The second half: the packages set themselves up, over the files of the first."""
    lines = [
        "mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates /var/log/apt /var/cache/apt/archives/partial",
        "touch /var/lib/dpkg/status /var/lib/dpkg/available",
        "printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d",
        "rm -f /etc/passwd- /etc/group-",
        "test -e /etc/passwd || cp /usr/share/base-passwd/passwd.master /etc/passwd",
        "test -e /etc/group || cp /usr/share/base-passwd/group.master /etc/group",
        # Neither now nor by later steps: what only people read is many of the files of a package.
        "printf 'path-exclude=/usr/share/%s/*\\n' doc info locale man > /etc/dpkg/dpkg.cfg.d/slim",
        "echo 'path-include=/usr/share/doc/*/copyright' >> /etc/dpkg/dpkg.cfg.d/slim",
        "dpkg --force-unsafe-io --force-depends --force-confnew --install /var/cache/squall/*.deb > /tmp/dpkg.log 2>&1"
        " || { cat /tmp/dpkg.log; exit 1; }",
        "rm -rf /var/cache/squall /tmp/dpkg.log /usr/lib/python3*/EXTERNALLY-MANAGED",
        "test -e /usr/local/bin/python || ln -s /usr/bin/python3 /usr/local/bin/python",
        "rm -rf /var/lib/apt/lists/* /var/log/* /usr/share/man/* /usr/share/locale/* /var/cache/debconf/*-old",
        "mkdir -p /var/log/apt",
    ]
    return Recipe(script(*lines), _apt_inputs(host), {"APT_CONFIG": f"{INPUTS}/apt.conf"})


_RECIPES: dict[str, Any] = {
    "debian": _debian,
    "run": _run,
    "apt": _apt,
    "uv": _uv,
    "pip": _pip,
    "uv_sync": _uv_sync,
    "poetry": _poetry,
    "private": _private,
    "copy": _copy,
    "function": _function,
}
