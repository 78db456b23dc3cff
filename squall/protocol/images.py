"""Recipes of images: what each kind of step holds, the keys that name its layers, and what a requirement may say.

A recipe is a list of `ImageStep`. The key of a step is the digest of its parent's key and of all the step says, so
equal recipes of a workspace have equal keys wherever they are computed, and a changed step changes its key and all
that follow. The base alone is the same in all workspaces.
`force` is no part of a key. Kinds that make a layer are `LAYER_KINDS`; the others set what later steps and containers
see. The client, the server and the agent check a recipe alike, as none of them trusts another. Pure: no I/O.
Tested in `tests/unit/test_images.py`.

    kind      args                                              what it does
    debian    suite, nonce                                      first only: a Debian of that release, with Python;
                                                                `nonce` sets its image and all on it apart
    run       commands                                          each command by the shell
    apt       packages                                          apt-get install
    pip       packages, requirements, options                   pip install
    uv        packages, requirements, options                   uv pip install
    uv_sync   pyproject, lock, options                          uv sync of a project, without the project
    poetry    pyproject, lock, options                          poetry install of a project, without the project
    private   repositories, git_user, options                   pip install from git repositories, with a token
    copy      target, python; the blob is a tar                 local files; `python`: what to put on the import path
    function  name, args (hex), tag, timeout                    runs it; the blob is the function by value, `args` its
                                                                pickled arguments, and the key is made of `tag`
    env       variables        workdir   path        shell, entrypoint, cmd   words
    mount     target, entry, python                             local files, shown when a container starts; last only

The steps that run something may also hold `env`, variables of theirs alone, and `secrets`, the *names* of variables
whose values travel beside the recipe, never in it: a key depends on the names and not on the values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from squall.exception import InvalidError
from squall.protocol.records import Record, field, record
from squall.protocol.specs import ImageSpec, ImageStep

RECIPE_VERSION = 1
"""Part of every key: raised when the same recipe has come to mean something else."""
DEBIAN = {"3.11": "bookworm", "3.13": "trixie"}
"""Python version -> the Debian release that has it."""
MAX_STEPS = 100
MAX_TEXT_BYTES = 1 << 20
DEFAULT_SHELL = ["/bin/sh", "-c"]

LAYER_KINDS = frozenset({"debian", "run", "apt", "pip", "uv", "uv_sync", "poetry", "private", "copy", "function"})
_ARGS: dict[str, dict[str, type]] = {
    "debian": {"suite": str, "nonce": str},
    "run": {"commands": list},
    "apt": {"packages": list},
    "pip": {"packages": list, "requirements": str, "options": dict},
    "uv": {"packages": list, "requirements": str, "options": dict},
    "uv_sync": {"pyproject": str, "lock": str, "options": dict},
    "poetry": {"pyproject": str, "lock": str, "options": dict},
    "private": {"repositories": list, "git_user": str, "options": dict},
    "copy": {"target": str, "python": str},
    "function": {"name": str, "args": str, "tag": str, "timeout": float},
    "env": {"variables": dict},
    "workdir": {"path": str},
    "shell": {"words": list},
    "entrypoint": {"words": list},
    "cmd": {"words": list},
    "mount": {"target": str, "entry": str, "python": str},
}
WITH_ENV = frozenset({"run", "apt", "pip", "uv", "uv_sync", "poetry", "private", "function"})
"""Kinds that may hold `env` and `secrets`."""
_ENV_ARGS = {"env": dict, "secrets": list}
_MAY_LACK = frozenset({"python", "options", "nonce", "lock"})
_WITH_BLOB = frozenset({"copy", "function", "mount"})
_OPTIONS: dict[str, type] = {
    "index_url": str, "extra_index_url": str, "find_links": str, "pre": bool, "extra_options": str, "frozen": bool,
    "groups": list, "extras": list, "with": list, "without": list, "only": list, "version": str,
}  # fmt: skip


# ---- keys -------------------------------------------------------------------------------------------------------


def chain(steps: Iterable[ImageStep], workspace: str = "") -> Iterator[tuple[str, ImageStep]]:
    """Each step with its key, in order. Keys above the base are a workspace's own: what a step made may depend on
    secrets, which are no part of its key, and on whoever said what the `tag` of a function is."""
    import hashlib  # 4 ms that writing an image down does not need, nor json's 2
    import json

    parent = ""
    for step in steps:
        # A function's pickle differs with the line it stands on; what counts of it is in its tag.
        args = {name: step.args.get(name) for name in _function_args(step)} if step.kind == "function" else step.args
        blob = "" if step.kind == "function" else step.blob
        whose = [workspace] if workspace and step.kind != "debian" else []
        said = json.dumps([RECIPE_VERSION, parent, step.kind, args, blob, *whose], sort_keys=True)
        parent = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        yield parent, step


def _function_args(step: ImageStep) -> list[str]:
    return ["tag", *(name for name in _ENV_ARGS if name in step.args)]


def image_id_of(steps: Iterable[ImageStep]) -> str:
    """`im-` and the beginning of the last step's key."""
    keys = [key for key, _ in chain(steps)]
    return f"im-{keys[-1][:20]}" if keys else ""


def build_id_of(image: ImageSpec) -> str:
    """What the server and its nodes call an image: unlike `image_id_of`, which clients use, unique over workspaces."""
    return "-".join(filter(None, (image_id_of(image.steps), image.workspace)))


def layer_keys(image: ImageSpec) -> Iterator[tuple[str, ImageStep]]:
    """The key of every layer of an image, lowest first, with the step it belongs to. A base has two: its packages'
    files, and what setting them up made of them."""
    for key, step in chain(image.steps, image.workspace):
        if step.kind == "debian":
            yield f"{key}-files", step
        if step.kind in LAYER_KINDS:
            yield key, step


@record
class Settings(Record):
    """What the steps that make no layer say, as far as they have come."""

    env: dict[str, str] = field(default_factory=dict)
    workdir: str = ""
    shell: list[str] = field(default_factory=lambda: list(DEFAULT_SHELL))
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    import_paths: list[str] = field(default_factory=list)
    """Where local modules lie."""
    mounts: list[tuple[str, str, str]] = field(default_factory=list)
    """Digest, entry (of the bundle; empty for all of it) and target of each, in order."""

    def take(self, step: ImageStep) -> None:
        path = step.args.get("python", "")
        if path and path not in self.import_paths:
            self.import_paths.append(path)
        if step.kind == "env":
            self.env.update(step.args["variables"])
        elif step.kind == "workdir":
            self.workdir = step.args["path"]
        elif step.kind == "mount":
            self.mounts.append((step.blob, step.args["entry"], step.args["target"]))
        elif step.kind in ("shell", "entrypoint", "cmd"):
            setattr(self, step.kind, list(step.args["words"]))


def settings_of(steps: Iterable[ImageStep]) -> Settings:
    settings = Settings()
    for step in steps:
        settings.take(step)
    return settings


# ---- what people see of a step ------------------------------------------------------------------------------------


def title_of(step: ImageStep) -> str:
    """A step as its user wrote it, in one line."""
    return _one_line(_TITLES[step.kind](step), 160)


def _installed(step: ImageStep) -> str:
    words = [*step.args.get("packages", []), *(["-r requirements"] if step.args.get("requirements") else [])]
    return " ".join(words)


_TITLES: dict[str, Any] = {
    "debian": lambda step: f"debian_slim {step.args['suite']}{' without the cache' if 'nonce' in step.args else ''}",
    "run": lambda step: "run " + "; ".join(step.args["commands"]),
    "apt": lambda step: "apt install " + " ".join(step.args["packages"]),
    "pip": lambda step: "pip install " + _installed(step),
    "uv": lambda step: "uv pip install " + _installed(step),
    "uv_sync": lambda step: "uv sync",
    "poetry": lambda step: "poetry install",
    "private": lambda step: "pip install from " + " ".join(step.args["repositories"]),
    "copy": lambda step: f"copy local files to {step.args['target']}",
    "function": lambda step: f"run function {step.args['name']}",
    "env": lambda step: "env " + " ".join(f"{k}={v}" for k, v in step.args["variables"].items()),
    "workdir": lambda step: f"workdir {step.args['path']}",
    "shell": lambda step: "shell " + " ".join(step.args["words"]),
    "entrypoint": lambda step: "entrypoint " + " ".join(step.args["words"]),
    "cmd": lambda step: "cmd " + " ".join(step.args["words"]),
    "mount": lambda step: f"show local files at {step.args['target']}",
}


def _one_line(text: str, limit: int) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---- checks -----------------------------------------------------------------------------------------------------


def check_image(image: ImageSpec) -> None:
    """Refuse a recipe that is none. Raises InvalidError."""
    if image.kind == "host":
        if image.steps:
            raise InvalidError("build steps cannot be added to `Image.host()`", hint=HOST_HINT)
        return
    if image.kind != "layers":
        raise InvalidError(f"image kind `{image.kind[:40]}` is unknown")
    if not image.steps or image.steps[0].kind != "debian":
        raise InvalidError("an image begins with a base", hint="begin with `squall.Image.debian_slim()`")
    if len(image.steps) > MAX_STEPS:
        raise InvalidError(f"the image has {len(image.steps)} steps, the limit is {MAX_STEPS}", hint="join commands")
    for number, step in enumerate(image.steps):
        check_step(step)
        if number and step.kind == "debian":
            raise InvalidError("an image has one base, the first step")
        if number and step.kind in LAYER_KINDS and image.steps[number - 1].kind == "mount":
            raise InvalidError(
                f"`{title_of(step)}` follows local files that are only shown when a container starts",
                hint="add them after it, or copy them into the image with `copy=True`",
            )


HOST_HINT = "it shows this machine's files, read-only; begin with `squall.Image.debian_slim()` to build on"


def check_step(step: ImageStep) -> None:
    fields = _ARGS.get(step.kind)
    if fields is None:
        raise InvalidError(f"image step `{step.kind[:40]}` is unknown")
    allowed = {**fields, **_ENV_ARGS} if step.kind in WITH_ENV else fields
    for name, value in step.args.items():
        kind = allowed.get(name)
        if kind is None or not isinstance(value, (int, float) if kind is float else kind):
            raise InvalidError(f"image step `{step.kind}`: `{name[:40]}` cannot be {value!r:.80}")
    missing = [name for name, kind in fields.items() if name not in step.args and name not in _MAY_LACK]
    if missing and step.kind not in ("pip", "uv"):
        raise InvalidError(f"image step `{step.kind}` lacks `{missing[0]}`")
    if (step.kind in _WITH_BLOB) != bool(step.blob):
        raise InvalidError(f"image step `{step.kind}`: its files are {'missing' if not step.blob else 'unexpected'}")
    _check_variables(step.args.get("env", {}))
    for name in step.args.get("secrets", []):
        if not isinstance(name, str) or not re.fullmatch(_VARIABLE, name):
            raise InvalidError(f"image step `{step.kind}`: {name!r:.80} cannot name a secret's variable")
    _CHECKS.get(step.kind, lambda _: None)(step)


def check_secrets(image: ImageSpec, secrets: Mapping[str, Mapping[str, str]]) -> None:
    """Values for the steps' secrets, by the step's number from 1: each must be asked for by that step."""
    for number, values in secrets.items():
        at = int(number) - 1 if number.isascii() and number.isdigit() else -1
        if not 0 <= at < len(image.steps) or not set(values) <= set(image.steps[at].args.get("secrets", [])):
            raise InvalidError(f"secrets for step `{number[:40]}` of an image, which asks for none of these")
        _check_variables(values, "secret")


def _check_debian(step: ImageStep) -> None:
    if step.args["suite"] not in DEBIAN.values():
        raise InvalidError(f"Debian release `{step.args['suite'][:40]}` is unknown here")


def _check_words(step: ImageStep, name: str, what: str) -> None:
    for word in step.args.get(name, []):
        if not isinstance(word, str) or not word.strip() or "\0" in word:
            raise InvalidError(f"{what} {word!r:.200} is not a text with something in it")


def _check_run(step: ImageStep) -> None:
    if not step.args["commands"]:
        raise InvalidError("`run_commands` needs a command")
    _check_words(step, "commands", "command")


_APT_NAME = r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?([=/][A-Za-z0-9.+:~-]+)?"


def _check_apt(step: ImageStep) -> None:
    for name in step.args["packages"]:
        if not isinstance(name, str) or not re.fullmatch(_APT_NAME, name):
            raise InvalidError(
                f"{name!r:.200} is not the name of a Debian package",
                hint="as in `apt_install('git', 'curl=7.88.1-10')`",
            )
    if not step.args["packages"]:
        raise InvalidError("`apt_install` needs a package")


def _check_packages(step: ImageStep) -> None:
    options = step.args.get("options", {})
    for name, value in options.items():
        if not isinstance(value, _OPTIONS.get(name, ())):
            raise InvalidError(f"package option `{name[:40]}` cannot be {value!r:.80}")
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, bool) and (not isinstance(text, str) or not text.strip() or not text.isprintable()):
                raise InvalidError(f"package option `{name}` cannot be {text!r:.80}")
            check_no_credentials(str(text), f"package option `{name}`")
    for requirement in step.args.get("packages", []):
        check_no_credentials(check_requirement(requirement), "a requirement")
    if len(step.args.get("requirements", "")) > MAX_TEXT_BYTES:
        raise InvalidError(f"the requirements are longer than {MAX_TEXT_BYTES} bytes")
    check_requirements_text(step.args.get("requirements", ""))
    check_no_credentials(step.args.get("requirements", ""), "the requirements file")
    if step.kind in ("pip", "uv") and not step.args.get("packages") and not step.args.get("requirements"):
        raise InvalidError("installing packages needs a package", hint='as in `uv_pip_install("numpy")`')


_USER_OF_URL = r"https?://([^/?#\s@]+)@"


def check_no_credentials(text: str, what: str) -> None:
    """A recipe is kept, listed and hashed in the clear: a password is no part of it. `${NAME}`, which pip and uv look
    up when they run, may stand for one."""
    for found in re.finditer(_USER_OF_URL, text):
        user, _, password = found[1].partition(":")
        if not re.fullmatch(r"\$\{\w+\}", password or user):
            host = text[found.end() :].split("/")[0][:80]
            raise InvalidError(
                f"{what} holds the credentials of `https://…@{host}`, and a recipe is no secret",
                hint="give the step a secret with `UV_DEFAULT_INDEX` or `PIP_INDEX_URL`, the whole URL; in a "
                "requirements file `https://${NAME}@…` with a secret of that name",
            )


def check_requirement(requirement: object) -> str:
    """One requirement as a package index knows it. Options, files of the builder's and line breaks are refused."""
    if not isinstance(requirement, str) or not requirement.strip():
        raise InvalidError(f"requirement {requirement!r:.200} is not the name of a package")
    if not requirement.isprintable():
        raise InvalidError(f"requirement {requirement!r:.200} has a line break or another control character in it")
    if requirement.lstrip().startswith("-"):
        raise InvalidError(
            f"requirement `{requirement[:200]}` is an option, not a package",
            hint="use `index_url=`, `extra_index_url=`, `find_links=`, `pre=` or `extra_options=`, and "
            "`pip_install_from_requirements` for a file",
        )
    if not re.match(_REQUIREMENT, requirement.strip()):
        raise InvalidError(
            f"requirement `{requirement[:200]}` is not the name of a package",
            hint='as in `"numpy"`, `"numpy>=2"` or `"name @ https://…"`; local files go in with `add_local_file`',
        )
    return requirement


_REQUIREMENT = (
    r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\s*(\[[A-Za-z0-9,._\s-]*\])?\s*"
    r"($|;|\(?\s*[<>=!~]=?|===|@\s*(https?|git\+https?|git\+ssh)://)"
)
_ALLOWED_LINES = r"(--(index-url|extra-index-url|find-links|pre|prefer-binary|only-binary|no-binary)\b|-i\s|-f\s)"
_HASHES = r"\s+--hash[=\s]\S+"


def check_requirements_text(text: str) -> None:
    """The lines of a requirements file. Those that read other files of the builder's are refused."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        if line and not re.match(_ALLOWED_LINES, line):
            check_requirement(re.sub(_HASHES, "", line))


def _check_target(step: ImageStep) -> None:
    check_path(step.args["target"])


def _check_mount(step: ImageStep) -> None:
    target, entry = check_path(step.args["target"]).rstrip("/"), step.args["entry"]
    if "/" in entry or "\0" in entry or entry in (".", ".."):
        raise InvalidError(f"{entry!r:.80} is not the name of a file")
    if not entry and (not target or target in _SYSTEM):
        raise InvalidError(
            f"local files shown at `{target or '/'}` would hide what the image has there",
            hint="use a directory of their own, or copy them in with `copy=True`",
        )


_SYSTEM = frozenset(
    ("/bin", "/boot", "/etc", "/home", "/lib", "/lib64", "/media", "/mnt", "/opt", "/root", "/run", "/sbin", "/src",
     "/srv", "/tmp", "/usr", "/usr/bin", "/usr/lib", "/usr/local", "/usr/sbin", "/var", "/var/lib")
)  # fmt: skip


_RESERVED = ("/proc", "/dev", "/sys", "/.squall")


def check_path(path: str) -> str:
    """An absolute path in an image that files may be put at."""
    parts = path.split("/")
    if not path.startswith("/") or ".." in parts or not path.isprintable() or len(path) > 4000:
        raise InvalidError(f"{path!r:.200} is not an absolute path", hint="paths in an image begin with `/`")
    if any(path == place or path.startswith(f"{place}/") for place in _RESERVED):
        raise InvalidError(f"`{path}` is not an image's to fill", hint="use another directory")
    return path


_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"


def _check_env(step: ImageStep) -> None:
    _check_variables(step.args["variables"])


def _check_variables(variables: Mapping[str, object], what: str = "environment variable") -> None:
    for name, value in variables.items():
        if not re.fullmatch(_VARIABLE, name) or not isinstance(value, str) or "\0" in value:
            shown = "what it is" if what == "secret" else f"{value!r:.80}"
            raise InvalidError(f"{what} {name!r:.80} cannot be {shown}")


_REPOSITORY = (
    r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?)(/[A-Za-z0-9_~][A-Za-z0-9._~-]*){2,}(@[A-Za-z0-9][A-Za-z0-9._/+-]*)?"
    r"(#(subdirectory|egg)=[A-Za-z0-9._/-]+)?"
)


def token_of(repository: str) -> tuple[str, str]:
    """The host of a private repository, and the variable that its token is read from. Raises InvalidError."""
    found = re.fullmatch(_REPOSITORY, repository) if isinstance(repository, str) else None
    if found is None or "/.." in repository:
        raise InvalidError(
            f"{repository!r:.200} is not the name of a git repository",
            hint="as in `github.com/owner/name` or `gitlab.com/owner/name@v1.2`",
        )
    host = found["host"]
    kind = next((name for name in ("github", "gitlab") if name in host.lower()), "git")
    return host, f"{kind.upper()}_TOKEN"


def _check_private(step: ImageStep) -> None:
    if not step.args["repositories"]:
        raise InvalidError("`pip_install_private_repos` needs a repository")
    if not re.fullmatch(r"[A-Za-z0-9._@+-]+", step.args["git_user"]):
        raise InvalidError(f"{step.args['git_user']!r:.80} is not the name of a git user")
    for repository in step.args["repositories"]:
        _, token = token_of(repository)
        if token not in step.args.get("secrets", []):
            raise InvalidError(
                f"`{repository}` is read with a token, and no secret of the step has `{token}`",
                hint=f'as in `secrets=[squall.Secret.from_local_environ(["{token}"])]`',
            )
    _check_packages(step)


def _check_workdir(step: ImageStep) -> None:
    check_path(step.args["path"])


def _check_shell(step: ImageStep) -> None:
    _check_words(step, "words", step.kind)
    if step.kind == "shell" and not step.args["words"]:
        raise InvalidError("`shell` needs a program")


_CHECKS: dict[str, Any] = {
    "debian": _check_debian,
    "run": _check_run,
    "apt": _check_apt,
    "pip": _check_packages,
    "uv": _check_packages,
    "uv_sync": _check_packages,
    "poetry": _check_packages,
    "private": _check_private,
    "copy": _check_target,
    "mount": _check_mount,
    "env": _check_env,
    "workdir": _check_workdir,
    "shell": _check_shell,
    "entrypoint": _check_shell,
    "cmd": _check_shell,
}
