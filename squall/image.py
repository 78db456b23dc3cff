"""Image: the root file system a function's containers see, written as a recipe.

An `Image` is immutable and lazy: each method gives a new one with a step more, and nothing happens until an app that
uses it runs, or `.build()` is called. Then the steps whose layers are missing are built, in containers, on the node.
Local files named in steps are read at that moment. What a step may say is checked where it is written, by
`protocol.images`. Tested in `tests/unit/test_image.py` and `tests/integration/test_images.py`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from squall import _steps
from squall.exception import InvalidError, VersionError
from squall.protocol.records import replaced
from squall.protocol.specs import ImageSpec, ImageStep

if TYPE_CHECKING:
    from squall._files import Ignore
    from squall.client import Output
    from squall.secret import Secret

_NOT_YET = frozenset(
    {
        "from_registry",
        "from_dockerfile",
        "from_aws_ecr",
        "from_gcp_artifact_registry",
        "from_name",
        "from_scratch",
        "micromamba",
        "dockerfile_commands",
        "publish",
    }
)
_LATER = {
    "gpu": "builds have no GPU: load what needs one in `@squall.enter()`",
    "volumes": "builds see no volumes; packages are cached by themselves",
    "cpu": "builds may use all of the machine's cores",
    "memory": "builds may use all of the machine's memory",
}
"""Options of steps that others know, and what there is in their place."""


def _refuse(name: str) -> NoReturn:
    if name in _NOT_YET:
        raise InvalidError(
            f"`Image.{name}` is not available in this release",
            hint="`run_commands` runs any command; `docs/guide/images.md` says what there is",
        )
    raise AttributeError(f"`Image` has no attribute `{name}`")


class _ImageMeta(type):
    def __getattr__(cls, name: str) -> Any:
        _refuse(name)


class _Part:
    """A step as written, and how to read what it needs of this disk when it is built."""

    __slots__ = ("read", "secrets", "step")

    def __init__(
        self, step: ImageStep, read: Callable[[], bytes] | None = None, secrets: Mapping[str, str] | None = None
    ) -> None:
        self.step = step
        self.read = read
        self.secrets = secrets or {}


class _Own:
    """What is a step's alone."""

    __slots__ = ("env", "later", "secrets")

    def __init__(
        self,
        secrets: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        later: Mapping[str, object] | None = None,
    ) -> None:
        self.secrets = secrets or {}
        self.env = env or {}
        self.later = later or {}


_NOTHING = _Own()


def _own(secrets: Sequence[Secret] | None, env: Mapping[str, str | None] | None, later: Mapping[str, object]) -> _Own:
    if not secrets and not env:
        return _Own(later=later)
    from squall.secret import Secret, checked_env

    values: dict[str, str] = {}
    for secret in [secrets] if isinstance(secrets, Secret) else secrets or ():
        if not isinstance(secret, Secret):
            raise InvalidError(f"`secrets` of an image step holds {type(secret).__name__!r}, which is no `Secret`")
        if secret._ref:
            raise InvalidError(
                f"an image step cannot use {secret!r}: its values never leave the server",
                hint="give the step `Secret.from_dict`, `from_dotenv` or `from_local_environ`",
            )
        values.update(secret._values)
    return _Own(values, checked_env(env or {}, "env"), later)


class Image(metaclass=_ImageMeta):
    """What a container's root file system holds: a base, and steps that add to it.

    `Image.host()`, the default, shows this machine's own Python environment. `Image.debian_slim()` is a small Debian
    with Python, built from a Debian mirror the first time, to which the other methods add. Each method returns a new
    image, so one can be the beginning of several. Every step becomes a layer that is built once: a changed step is
    built again, with those after it, and unchanged ones are not.

    Example:

        image = squall.Image.debian_slim("3.11").apt_install("git").uv_pip_install("numpy", "pandas")
        app = squall.App("tables", image=image)
    """

    def __init__(self, parts: tuple[_Part, ...] = (), *, kind: str = "host", fixed: ImageSpec | None = None) -> None:
        self._parts = parts
        self._kind = kind
        self._fixed = fixed
        """The recipe of an image that the server knows."""

    # -- bases

    @classmethod
    def host(cls) -> Image:
        """This machine's system directories and the Python environment Squall runs with, read-only.

        `pip install` a package beside Squall and your functions can import it. `docs/guide/environment.md` says what
        is shown and what is hidden. Nothing can be built on it.
        """
        return cls()

    @classmethod
    def debian_slim(cls, python_version: str | None = None, *, force_build: bool = False) -> Image:
        """A small Debian with Python and pip, made from the Debian mirror this machine uses.

        - `python_version`: `"3.11"` (Debian 12) or `"3.13"` (Debian 13); your own version when left out, which must
          be one of these.
        - `force_build`: True makes it anew, and with it all that is built on it.

        Raises InvalidError for a version that no Debian release has.

        Example:

            image = squall.Image.debian_slim("3.11")
        """
        from squall.protocol.images import DEBIAN

        wanted = python_version if python_version is not None else f"{sys.version_info[0]}.{sys.version_info[1]}"
        suite = DEBIAN.get(str(wanted))
        if suite is None:
            said = "asks for" if python_version is not None else "takes your own version,"
            raise InvalidError(
                f"`Image.debian_slim` {said} Python `{wanted}`, which no Debian release here has",
                hint=f"give one of: {', '.join(repr(version) for version in DEBIAN)}",
            )
        return cls((_Part(_checked(ImageStep("debian", {"suite": suite}, force=force_build))),), kind="layers")

    @classmethod
    def from_id(cls, image_id: str) -> Image:
        """An image that was built before, by its id as `squall image list` shows it. Raises NotFoundError.

        Example:

            image = squall.Image.debian_slim("3.11").build()
            same = squall.Image.from_id(image.image_id)
        """
        from squall._session import find_image

        return cls(kind="layers", fixed=find_image(image_id))

    @property
    def image_id(self) -> str:
        """`im-` and a digest of all its steps; empty for `Image.host()`. Reads the local files that the steps name."""
        return self._resolve()[0].image_id

    # -- commands

    def run_commands(
        self,
        *commands: str | Sequence[str],
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Run shell commands, each in a shell of its own, in order; the first that fails ends the build.

        They run as root of the image, reach the internet, and see no file of yours.

        - `force_build`: True runs them again, with all later steps, even though nothing changed.
        - `secrets`: variables that these commands alone see. Their values are in no layer and no recipe, unless a
          command writes them down, and are struck out of the output. A new value runs nothing again.
        - `env`: variables that these commands alone see; `.env()` sets them for all that follows.

        All steps that run something take these three.

        Example:

            image = squall.Image.debian_slim("3.11").run_commands("echo hello > /etc/greeting")
        """
        return self._with(
            "run", {"commands": _steps.words("run_commands", commands)}, force_build, _own(secrets, env, later)
        )

    def apt_install(
        self,
        *packages: str | Sequence[str],
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Install Debian packages, without what they merely recommend.

        Example:

            image = squall.Image.debian_slim("3.11").apt_install("git", "curl")
        """
        return self._with(
            "apt", {"packages": _steps.words("apt_install", packages)}, force_build, _own(secrets, env, later)
        )

    # -- Python packages

    def uv_pip_install(
        self,
        *packages: str | Sequence[str],
        requirements: Sequence[str] | None = None,
        index_url: str | None = None,
        extra_index_url: str | None = None,
        find_links: str | None = None,
        pre: bool = False,
        extra_options: str = "",
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Install Python packages with uv, into the image's Python. Much faster than pip, above all when repeated.

        - `packages`: as pip writes them, `"numpy"`, `"pandas>=2"`, `"name @ https://..."`.
        - `requirements`: paths of requirements files of yours.
        - `index_url`, `extra_index_url`, `find_links`: where to look, beside what this machine's pip and uv are
          configured with; with `index_url`, in its place.
        - `pre`: True allows versions before a release.
        - `extra_options`: further options for `uv pip install`, as in a shell.
        - `force_build`: True installs again, with all later steps.

        Example:

            image = squall.Image.debian_slim("3.11").uv_pip_install("numpy", "pandas")
        """
        options = _steps.options(index_url, extra_index_url, find_links, pre, extra_options)
        return self._install("uv", packages, requirements, options, force_build, _own(secrets, env, later))

    def pip_install(
        self,
        *packages: str | Sequence[str],
        index_url: str | None = None,
        extra_index_url: str | None = None,
        find_links: str | None = None,
        pre: bool = False,
        extra_options: str = "",
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Install Python packages with pip; the arguments are those of `uv_pip_install`.

        Example:

            image = squall.Image.debian_slim("3.11").pip_install("requests==2.32.3")
        """
        options = _steps.options(index_url, extra_index_url, find_links, pre, extra_options)
        return self._install("pip", packages, None, options, force_build, _own(secrets, env, later))

    def pip_install_from_requirements(
        self,
        requirements_txt: str,
        *,
        index_url: str | None = None,
        extra_index_url: str | None = None,
        find_links: str | None = None,
        pre: bool = False,
        extra_options: str = "",
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Install what a requirements file of yours names, with pip. Its text is part of the step: a change builds it
        again. It may not name other files.

        Example:

            from pathlib import Path

            Path("requirements.txt").write_text("six==1.17.0\\n")
            image = squall.Image.debian_slim("3.11").pip_install_from_requirements("requirements.txt")
        """
        options = _steps.options(index_url, extra_index_url, find_links, pre, extra_options)
        return self._install("pip", (), [requirements_txt], options, force_build, _own(secrets, env, later))

    def _install(
        self, kind: str, packages: Sequence[Any], files: Sequence[str] | None, options: dict[str, Any], force: bool,
        own: _Own,
    ) -> Image:  # fmt: skip
        args: dict[str, Any] = {"packages": _steps.words(_METHODS[kind], packages)}
        if files:
            args["requirements"] = "\n".join(_steps.read_text(path) for path in _steps.paths(files))
        if options:
            args["options"] = options
        return self._with(kind, args, force, own)

    def pip_install_from_pyproject(
        self,
        pyproject_toml: str,
        optional_dependencies: Sequence[str] = (),
        *,
        index_url: str | None = None,
        extra_index_url: str | None = None,
        find_links: str | None = None,
        pre: bool = False,
        extra_options: str = "",
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Install the dependencies of a project of yours, not the project itself, with pip.

        - `pyproject_toml`: its file; `[project] dependencies` are installed.
        - `optional_dependencies`: groups of `[project.optional-dependencies]` to install too.

        Example:

            from pathlib import Path

            Path("pyproject.toml").write_text('[project]\\nname = "mine"\\ndependencies = ["six"]\\n')
            image = squall.Image.debian_slim("3.11").pip_install_from_pyproject("pyproject.toml")
        """
        options = _steps.options(index_url, extra_index_url, find_links, pre, extra_options)
        packages = _steps.dependencies(os.fspath(pyproject_toml), optional_dependencies)
        return self._install("pip", packages, None, options, force_build, _own(secrets, env, later))

    def pip_install_private_repos(
        self,
        *repositories: str,
        git_user: str,
        find_links: str | None = None,
        index_url: str | None = None,
        extra_index_url: str | None = None,
        pre: bool = False,
        extra_options: str = "",
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Install Python packages from git repositories that ask for a user and a token, over https, with pip.

        - `repositories`: as `github.com/owner/name@ref`; `@ref` is a branch, tag or commit.
        - `git_user`: the user the token belongs to.
        - `secrets`: must hold `GITHUB_TOKEN` for hosts of GitHub, `GITLAB_TOKEN` for those of GitLab, `GIT_TOKEN` for
          others. A token is told to its own host only and is part of no layer; installing runs code of the package,
          which can see it.

        git is installed where the image has none. A new token installs nothing again; a new `@ref` does.

        Example:

            image = squall.Image.debian_slim("3.11").pip_install_private_repos(
                "github.com/owner/name@v1.0",
                git_user="somebody",
                secrets=[squall.Secret.from_dict({"GITHUB_TOKEN": "..."})],
            )
        """
        options = _steps.options(index_url, extra_index_url, find_links, pre, extra_options)
        args: dict[str, Any] = {"repositories": _steps.words("pip_install_private_repos", repositories)}
        args |= {"git_user": git_user, **({"options": options} if options else {})}
        return self._with("private", args, force_build, _own(secrets, env, later))

    def poetry_install_from_file(
        self,
        poetry_pyproject_toml: str,
        poetry_lockfile: str | None = None,
        *,
        ignore_lockfile: bool = False,
        with_: Sequence[str] = (),
        without: Sequence[str] = (),
        only: Sequence[str] = (),
        poetry_version: str | None = "latest",
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Install the locked dependencies of a Poetry project of yours, not the project itself and not Poetry.

        - `poetry_pyproject_toml`: its file.
        - `poetry_lockfile`: its lock; `poetry.lock` beside it when left out, which then must exist.
        - `ignore_lockfile`: True has Poetry choose versions anew, in the build; your lock stays as it is.
        - `with_`, `without`, `only`: groups of dependencies, as Poetry's options of these names.
        - `poetry_version`: the Poetry that reads the lock, such as `"1.8.5"`.

        Example:

            from pathlib import Path

            Path("pyproject.toml").write_text(
                '[tool.poetry]\nname = "mine"\nversion = "1"\ndescription = ""\nauthors = []\n'
                '[tool.poetry.dependencies]\npython = "^3.11"\nsix = "*"\n'
            )
            image = squall.Image.debian_slim("3.11").poetry_install_from_file("pyproject.toml", ignore_lockfile=True)
        """
        args: dict[str, Any] = {"pyproject": _steps.read_text(os.fspath(poetry_pyproject_toml))}
        beside = os.path.join(os.path.dirname(os.path.abspath(poetry_pyproject_toml)), "poetry.lock")
        lock = beside if poetry_lockfile is None else os.fspath(poetry_lockfile)
        if not ignore_lockfile:
            if poetry_lockfile is None and not os.path.exists(beside) and not _steps.is_remote():
                raise InvalidError(
                    f"`{poetry_pyproject_toml}` has no `poetry.lock` beside it",
                    hint="make one with `poetry lock`, or give `ignore_lockfile=True`",
                )
            args["lock"] = _steps.read_text(lock)
        groups = {"with": with_, "without": without, "only": only}
        options: dict[str, Any] = {n: _steps.words("poetry_install_from_file", [v]) for n, v in groups.items() if v}
        if poetry_version not in (None, "latest"):
            options["version"] = poetry_version
        args |= {"options": options} if options else {}
        return self._with("poetry", args, force_build, _own(secrets, env, later))

    def uv_sync(
        self,
        uv_project_dir: str = "./",
        *,
        groups: Sequence[str] | None = None,
        extras: Sequence[str] | None = None,
        frozen: bool = True,
        extra_options: str = "",
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Install the locked dependencies of a uv project of yours, not the project itself.

        - `uv_project_dir`: where its `pyproject.toml` and `uv.lock` are.
        - `groups`, `extras`: dependency groups and optional dependencies to install too.
        - `frozen`: False lets uv bring the lock up to date first, in the build; your file stays as it is.

        Example:

            from pathlib import Path

            Path("pyproject.toml").write_text('[project]\\nname = "mine"\\nversion = "1"\\ndependencies = ["six"]\\n')
            image = squall.Image.debian_slim("3.11").uv_sync(frozen=False)
        """
        project = os.fspath(uv_project_dir)
        args: dict[str, Any] = {"pyproject": _steps.read_text(os.path.join(project, "pyproject.toml"))}
        if os.path.exists(os.path.join(project, "uv.lock")):
            args["lock"] = _steps.read_text(os.path.join(project, "uv.lock"))
        elif frozen and not _steps.is_remote():
            raise InvalidError(f"`{project}` has no `uv.lock`", hint="make one with `uv lock`, or give `frozen=False`")
        options = {"groups": list(groups or ()), "extras": list(extras or ()), "extra_options": extra_options}
        args["options"] = {"frozen": bool(frozen), **{name: value for name, value in options.items() if value}}
        return self._with("uv_sync", args, force_build, _own(secrets, env, later))

    # -- your own files and code

    def add_local_file(self, local_path: str, remote_path: str, *, copy: bool = False) -> Image:
        """Show a file of yours in containers, at an absolute path; one that ends in `/` names the directory.

        It is sent when it has changed and costs no build. With `copy=True` it becomes a layer instead, so that later
        steps see it; needed before any step that builds.

        Example:

            image = squall.Image.debian_slim("3.11").add_local_file("settings.toml", "/etc/app/")
        """
        from squall import _files

        local = os.path.abspath(os.fspath(local_path))
        target = remote_path + os.path.basename(local) if remote_path.endswith("/") else remote_path
        directory, _, name = target.rpartition("/")
        read = functools.partial(_files.pack_file, local, name)
        if not name:
            raise InvalidError(f"`add_local_file(remote_path={remote_path!r:.80})` names no file")
        return self._add(read, directory or "/", name, target, copy)

    def add_local_dir(
        self, local_path: str, remote_path: str, *, copy: bool = False, ignore: Sequence[str] | Ignore | None = None
    ) -> Image:
        """Show a directory of yours in containers, at an absolute path; `copy=True` makes it a layer.

        - `ignore`: patterns as in `.dockerignore`, or a function of the path within the directory that says True for
          what to leave out.

        Example:

            image = squall.Image.debian_slim("3.11").add_local_dir("data", "/data", ignore=["**/*.tmp"])
        """
        from squall import _files

        read = functools.partial(
            _files.pack_directory, os.path.abspath(os.fspath(local_path)), _files.read_ignore(ignore)
        )
        return self._add(read, remote_path, "", remote_path, copy)

    def add_local_python_source(
        self, *modules: str, copy: bool = False, ignore: Sequence[str] | Ignore | None = None
    ) -> Image:
        """Make modules or packages of yours importable in containers, found as your program would import them.

        They are shown below `/root`; a change costs no build. Your function's own module, or the package it is in,
        is there without this.

        Example:

            from pathlib import Path

            Path("helpers.py").write_text("ANSWER = 42\\n")
            image = squall.Image.debian_slim("3.11").add_local_python_source("helpers")
        """
        from squall import _files

        image = self
        for module in _steps.words("add_local_python_source", modules):
            path, is_package = _steps.module_path(module)
            if is_package:
                skip = _files.read_ignore(ignore, python=True)
                name = f"/root/{module}"
                read = functools.partial(_files.pack_directory, path, skip)
                image = image._add(read, name, "", name, copy, python="/root")
            else:
                name = f"{module}.py"
                read = functools.partial(_files.pack_file, path, name)
                image = image._add(read, "/root", name, f"/root/{name}", copy, python="/root")
        return image

    def _add(
        self, read: Callable[[], bytes], directory: str, entry: str, target: str, copy: bool, python: str = ""
    ) -> Image:
        args = {"target": directory} if copy else {"target": target, "entry": entry}
        if python:
            args["python"] = python
        return self._with_step(ImageStep("copy" if copy else "mount", args, blob=_UNREAD), read)

    def run_function(
        self,
        raw_f: Callable[..., Any],
        *,
        args: Sequence[object] = (),
        kwargs: Mapping[str, Any] | None = None,
        timeout: float = 3600.0,
        force_build: bool = False,
        secrets: Sequence[Secret] | None = None,
        env: Mapping[str, str | None] | None = None,
        **later: object,
    ) -> Image:
        """Run a function of yours in the image, once, to keep what it writes: a model's weights, say.

        It is sent by value, so your Python and the image's must be of the same minor version. It runs again when its
        source, its arguments or the values it refers to change.

        Example:

            def fetch():
                open("/weights", "w").write("42")

            image = squall.Image.debian_slim("3.11").run_function(fetch)
        """
        if not callable(raw_f):
            raise InvalidError(f"`Image.run_function({raw_f!r:.80})` takes a function")
        raw_f = getattr(raw_f, "raw_f", raw_f)
        self._check_python(f"`Image.run_function({getattr(raw_f, '__name__', 'function')})`")
        packed, tag, read = _steps.pack_function(raw_f, tuple(args), dict(kwargs or {}))
        name = getattr(raw_f, "__qualname__", type(raw_f).__name__)
        step_args = {"name": name, "args": packed.hex(), "tag": tag, "timeout": float(timeout)}
        return self._with("function", step_args, force_build, _own(secrets, env, later), blob=_UNREAD, read=read)

    def _check_python(self, what: str) -> None:
        from squall.protocol.images import DEBIAN

        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        suites = [part.step.args["suite"] for part in self._parts if part.step.kind == "debian"]
        there = next((version for version, suite in DEBIAN.items() if [suite] == suites), here)
        if there != here:
            raise VersionError(
                f"{what} sends a function by value from Python {here} to an image with Python {there}",
                hint="use an image with your own Python version, or `run_commands`",
            )

    @contextlib.contextmanager
    def imports(self) -> Iterator[None]:
        """Imports inside this block may fail in your program, where the packages need not be, and not in containers.

        Example:

            image = squall.Image.debian_slim("3.11").uv_pip_install("numpy")
            with image.imports():
                import numpy
        """
        try:
            yield
        except ImportError:
            if os.environ.get("SQUALL_IS_REMOTE"):
                raise

    def pipe(self, function: Callable[..., Image], *args: Any, **kwargs: Any) -> Image:
        """`function(image, *args, **kwargs)`: steps of your own in a chain of methods.

        Example:

            def with_tools(image):
                return image.apt_install("git", "curl")

            image = squall.Image.debian_slim("3.11").pipe(with_tools)
        """
        return function(self, *args, **kwargs)

    # -- what later steps and containers see

    def shell(self, shell_commands: Sequence[str]) -> Image:
        """The shell of later `run_commands`, as words; `["/bin/sh", "-c"]` before.

        Example:

            image = squall.Image.debian_slim("3.11").shell(["/bin/bash", "-ec"]).run_commands("[[ 1 < 2 ]]")
        """
        return self._with("shell", {"words": _steps.words("shell", [shell_commands])}, False, _NOTHING)

    def entrypoint(self, entrypoint_commands: Sequence[str]) -> Image:
        r"""A program that every container of the image begins with, before Squall's own process and in place of it.

        It is given that process's command as further arguments and must become it, as a script does that ends in
        `exec "$@"`; one that ends without is a container that could not start. It runs as what the function does, with
        the image's environment, before a function's own variables and secrets have arrived. Such containers start an
        interpreter of their own in place of being forked from one that is warm, which costs about 0.2 s each.
        Build steps run without it.

        Example:

            image = (
                squall.Image.debian_slim("3.11")
                .run_commands("printf '#!/bin/sh\ndate > /tmp/began\nexec \"$@\"\n' > /begin; chmod +x /begin")
                .entrypoint(["/begin"])
            )
        """
        return self._with("entrypoint", {"words": _steps.words("entrypoint", [entrypoint_commands])}, False, _NOTHING)

    def cmd(self, cmd: Sequence[str]) -> Image:
        """What runs in a container of the image that is told nothing else to run: `squall shell` without `-c` runs it
        in place of a shell. Functions do not use it.

        Example:

            image = squall.Image.debian_slim("3.11").cmd(["python3"])
        """
        return self._with("cmd", {"words": _steps.words("cmd", [cmd])}, False, _NOTHING)

    def env(self, variables: Mapping[str, str]) -> Image:
        """Set environment variables for later steps and for containers. Not for secrets: they become part of the
        image's recipe.

        Example:

            image = squall.Image.debian_slim("3.11").env({"TZ": "Europe/Berlin"})
        """
        if not isinstance(variables, Mapping) or not variables:
            raise InvalidError(f"`Image.env({variables!r:.80})` takes a dict of strings")
        return self._with("env", {"variables": dict(variables)}, False, _NOTHING)

    def workdir(self, path: str) -> Image:
        """The directory that later steps and containers start in; made when it is missing.

        Example:

            image = squall.Image.debian_slim("3.11").workdir("/work")
        """
        return self._with("workdir", {"path": str(path)}, False, _NOTHING)

    # -- building

    def build(self, output: Output | None = None) -> Image:
        """Build now what is missing, instead of when an app that uses it runs; returns the image.

        `output` gets what the steps write, as in `App.run`. Raises BuildError when a step fails.

        Example:

            image = squall.Image.debian_slim("3.11").run_commands("echo built > /built").build()
        """
        from squall._session import built_spec

        built_spec(self, output)
        return self

    # -- for the session

    @property
    def _spec(self) -> ImageSpec:
        """Stands for the image in a function's spec until it is built."""
        return ImageSpec(kind=self._kind)

    def _resolve(self) -> tuple[ImageSpec, dict[str, bytes]]:
        """The recipe as it is now, with the bytes of local files by their digests."""
        from squall.client import blob_digest
        from squall.config import load
        from squall.protocol.images import check_image, image_id_of

        if self._fixed is not None:
            return self._fixed, {}
        steps: list[ImageStep] = []
        blobs: dict[str, bytes] = {}
        config = load()
        forced = self._kind != "host" and config.force_build
        for part in self._parts:
            step = part.step
            if part.read is not None:
                data = part.read()
                step = ImageStep(step.kind, step.args, blob_digest(data), step.force)
                blobs[step.blob] = data
            if config.ignore_cache and step.kind == "debian":
                step = replaced(step, args={**step.args, "nonce": _nonce()}, force=False)
            elif forced and not steps:
                step = replaced(step, force=True)
            steps.append(step)
        spec = ImageSpec(self._kind, steps, image_id_of(steps) if steps else "")
        check_image(spec)
        return spec, blobs

    def _secrets(self) -> dict[str, dict[str, str]]:
        """Values of the steps' secrets, by the step's number."""
        return {str(number): dict(part.secrets) for number, part in enumerate(self._parts, 1) if part.secrets}

    def _with(
        self, kind: str, args: dict[str, Any], force: bool, own: _Own, *, blob: str = "",
        read: Callable[[], bytes] | None = None,
    ) -> Image:  # fmt: skip
        self._check_options(kind, own.later)
        if own.env:
            args["env"] = own.env
        if own.secrets:
            args["secrets"] = sorted(own.secrets)
        return self._with_step(ImageStep(kind, args, blob, force), read, own.secrets)

    def _check_options(self, kind: str, later: Mapping[str, object]) -> None:
        method = _METHODS.get(kind, kind)
        for name, value in later.items():
            if name not in _LATER:
                raise InvalidError(f"`Image.{method}` has no option `{name}`")
            if value:
                raise InvalidError(f"`Image.{method}({name}=...)` is not available yet", hint=_LATER[name])

    def _with_step(
        self, step: ImageStep, read: Callable[[], bytes] | None = None, secrets: Mapping[str, str] | None = None
    ) -> Image:
        from squall.protocol.images import HOST_HINT

        method = _METHODS.get(step.kind, step.kind)
        if self._kind == "host":
            raise InvalidError(f"`Image.{method}` cannot add to `Image.host()`", hint=HOST_HINT)
        parts = self._parts
        if self._fixed is not None:
            parts = tuple(_Part(step) for step in self._fixed.steps)
        return Image((*parts, _Part(_checked(step), read, secrets)), kind=self._kind)

    def __getattr__(self, name: str) -> Any:
        _refuse(name)

    def __repr__(self) -> str:
        if self._kind == "host":
            return "Image.host()"
        from squall.protocol.images import title_of

        return f"<Image: {'; '.join(title_of(part.step) for part in self._parts)}>"


_METHODS = {
    "debian": "debian_slim",
    "run": "run_commands",
    "apt": "apt_install",
    "pip": "pip_install",
    "uv": "uv_pip_install",
    "copy": "add_local_…",
    "mount": "add_local_…",
    "function": "run_function",
    "poetry": "poetry_install_from_file",
    "private": "pip_install_private_repos",
}
_UNREAD = "0" * 64
"""Stands for the digest of what is read when the image is built."""


@functools.cache
def _nonce() -> str:
    """Sets all images that this program builds with `SQUALL_IGNORE_CACHE` apart from those of others."""
    import secrets

    return secrets.token_hex(8)


def _checked(step: ImageStep) -> ImageStep:
    if _steps.is_remote():  # it was checked where it was built, and the files it names need not be here
        return step
    # Imported with the first step: its patterns and hashes cost more than all that `Image.host()` needs.
    from squall.protocol.images import check_step

    check_step(step)
    return step
