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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from squall.exception import InvalidError, VersionError
from squall.protocol.messages import ImageSpec, ImageStep

if TYPE_CHECKING:
    from squall._files import Ignore
    from squall.client import Output

_NOT_YET = frozenset(
    {
        "from_registry",
        "from_dockerfile",
        "from_aws_ecr",
        "from_gcp_artifact_registry",
        "from_name",
        "from_scratch",
        "micromamba",
        "poetry_install_from_file",
        "pip_install_private_repos",
        "dockerfile_commands",
        "publish",
    }
)
_LATER = ("gpu", "secrets", "volumes", "env")


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


@dataclass(frozen=True)
class _Part:
    """A step as written, and how to read what it needs of this disk when it is built."""

    step: ImageStep
    read: Callable[[], bytes] | None = None


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

    def run_commands(self, *commands: str | Sequence[str], force_build: bool = False, **later: object) -> Image:
        """Run shell commands, each in a shell of its own, in order; the first that fails ends the build.

        They run as root of the image, reach the internet, and see no file of yours. `force_build=True` runs them
        again, with all later steps, even though nothing changed.

        Example:

            image = squall.Image.debian_slim("3.11").run_commands("echo hello > /etc/greeting")
        """
        return self._with("run", {"commands": _words("run_commands", commands)}, force_build, later)

    def apt_install(self, *packages: str | Sequence[str], force_build: bool = False, **later: object) -> Image:
        """Install Debian packages, without what they merely recommend.

        Example:

            image = squall.Image.debian_slim("3.11").apt_install("git", "curl")
        """
        return self._with("apt", {"packages": _words("apt_install", packages)}, force_build, later)

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
        options = _options(index_url, extra_index_url, find_links, pre, extra_options)
        return self._install("uv", packages, requirements, options, force_build, later)

    def pip_install(
        self,
        *packages: str | Sequence[str],
        index_url: str | None = None,
        extra_index_url: str | None = None,
        find_links: str | None = None,
        pre: bool = False,
        extra_options: str = "",
        force_build: bool = False,
        **later: object,
    ) -> Image:
        """Install Python packages with pip; the arguments are those of `uv_pip_install`.

        Example:

            image = squall.Image.debian_slim("3.11").pip_install("requests==2.32.3")
        """
        options = _options(index_url, extra_index_url, find_links, pre, extra_options)
        return self._install("pip", packages, None, options, force_build, later)

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
        **later: object,
    ) -> Image:
        """Install what a requirements file of yours names, with pip. Its text is part of the step: a change builds it
        again. It may not name other files.

        Example:

            from pathlib import Path

            Path("requirements.txt").write_text("six==1.17.0\\n")
            image = squall.Image.debian_slim("3.11").pip_install_from_requirements("requirements.txt")
        """
        options = _options(index_url, extra_index_url, find_links, pre, extra_options)
        return self._install("pip", (), [requirements_txt], options, force_build, later)

    def _install(
        self, kind: str, packages: Sequence[Any], files: Sequence[str] | None, options: dict[str, Any], force: bool,
        later: Mapping[str, object],
    ) -> Image:  # fmt: skip
        args: dict[str, Any] = {"packages": _words(_METHODS[kind], packages)}
        if files:
            args["requirements"] = "\n".join(_read_text(path) for path in _paths(files))
        if options:
            args["options"] = options
        return self._with(kind, args, force, later)

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
        options = _options(index_url, extra_index_url, find_links, pre, extra_options)
        packages = _dependencies(os.fspath(pyproject_toml), optional_dependencies)
        return self._install("pip", packages, None, options, force_build, later)

    def uv_sync(
        self,
        uv_project_dir: str = "./",
        *,
        groups: Sequence[str] | None = None,
        extras: Sequence[str] | None = None,
        frozen: bool = True,
        extra_options: str = "",
        force_build: bool = False,
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
        args: dict[str, Any] = {"pyproject": _read_text(os.path.join(project, "pyproject.toml"))}
        if os.path.exists(os.path.join(project, "uv.lock")):
            args["lock"] = _read_text(os.path.join(project, "uv.lock"))
        elif frozen:
            raise InvalidError(f"`{project}` has no `uv.lock`", hint="make one with `uv lock`, or give `frozen=False`")
        options = {"groups": list(groups or ()), "extras": list(extras or ()), "extra_options": extra_options}
        args["options"] = {"frozen": bool(frozen), **{name: value for name, value in options.items() if value}}
        return self._with("uv_sync", args, force_build, later)

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
        for module in _words("add_local_python_source", modules):
            path, is_package = _module_path(module)
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
        packed, tag, read = _pack_function(raw_f, tuple(args), dict(kwargs or {}))
        name = getattr(raw_f, "__qualname__", type(raw_f).__name__)
        step_args = {"name": name, "args": packed.hex(), "tag": tag, "timeout": float(timeout)}
        self._check_options("function", later)
        return self._with_step(ImageStep("function", step_args, blob=_UNREAD, force=force_build), read)

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
        return self._with("shell", {"words": _words("shell", [shell_commands])}, False, {})

    def entrypoint(self, entrypoint_commands: Sequence[str]) -> Image:
        """A command kept with the image for what runs it as one; functions do not use it.

        Example:

            image = squall.Image.debian_slim("3.11").entrypoint(["python3"])
        """
        return self._with("entrypoint", {"words": _words("entrypoint", [entrypoint_commands])}, False, {})

    def cmd(self, cmd: Sequence[str]) -> Image:
        """Arguments kept with the image for its entrypoint; functions do not use them.

        Example:

            image = squall.Image.debian_slim("3.11").cmd(["--version"])
        """
        return self._with("cmd", {"words": _words("cmd", [cmd])}, False, {})

    def env(self, variables: Mapping[str, str]) -> Image:
        """Set environment variables for later steps and for containers. Not for secrets: they become part of the
        image's recipe.

        Example:

            image = squall.Image.debian_slim("3.11").env({"TZ": "Europe/Berlin"})
        """
        if not isinstance(variables, Mapping) or not variables:
            raise InvalidError(f"`Image.env({variables!r:.80})` takes a dict of strings")
        return self._with("env", {"variables": dict(variables)}, False, {})

    def workdir(self, path: str) -> Image:
        """The directory that later steps and containers start in; made when it is missing.

        Example:

            image = squall.Image.debian_slim("3.11").workdir("/work")
        """
        return self._with("workdir", {"path": str(path)}, False, {})

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
        forced = self._kind != "host" and load().force_build
        for part in self._parts:
            step = part.step
            if part.read is not None:
                data = part.read()
                step = ImageStep(step.kind, step.args, blob_digest(data), step.force)
                blobs[step.blob] = data
            steps.append(replace(step, force=True) if forced and not steps else step)
        spec = ImageSpec(self._kind, steps, image_id_of(steps) if steps else "")
        check_image(spec)
        return spec, blobs

    def _with(self, kind: str, args: dict[str, Any], force: bool, later: Mapping[str, object]) -> Image:
        self._check_options(kind, later)
        return self._with_step(ImageStep(kind, args, force=force))

    def _check_options(self, kind: str, later: Mapping[str, object]) -> None:
        method = _METHODS.get(kind, kind)
        for name in later:
            known = name in _LATER
            raise InvalidError(
                f"`Image.{method}` has no option `{name}`{' in this release' if known else ''}",
                hint="`.env()` sets variables for later steps" if name == "env" else "",
            )

    def _with_step(self, step: ImageStep, read: Callable[[], bytes] | None = None) -> Image:
        from squall.protocol.images import HOST_HINT

        method = _METHODS.get(step.kind, step.kind)
        if self._kind == "host":
            raise InvalidError(f"`Image.{method}` cannot add to `Image.host()`", hint=HOST_HINT)
        parts = self._parts
        if self._fixed is not None:
            parts = tuple(_Part(step) for step in self._fixed.steps)
        return Image((*parts, _Part(_checked(step), read)), kind=self._kind)

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
}
_UNREAD = "0" * 64
"""Stands for the digest of what is read when the image is built."""


def _checked(step: ImageStep) -> ImageStep:
    # Imported with the first step: its patterns and hashes cost more than all that `Image.host()` needs.
    from squall.protocol.images import check_step

    check_step(step)
    return step


def _words(method: str, values: Sequence[Any]) -> list[str]:
    """Arguments given one by one, in lists, or both."""
    found: list[str] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += _words(method, value)
        elif isinstance(value, str):
            found.append(value)
        else:
            raise InvalidError(f"`Image.{method}` takes strings, not {value!r:.80}")
    return found


def _options(
    index_url: str | None, extra_index_url: str | None, find_links: str | None, pre: bool, extra_options: str
) -> dict[str, Any]:
    options = {
        "index_url": index_url,
        "extra_index_url": extra_index_url,
        "find_links": find_links,
        "pre": pre,
        "extra_options": extra_options,
    }
    return {name: value for name, value in options.items() if value}


def _paths(files: Sequence[str]) -> list[str]:
    if isinstance(files, str):
        raise InvalidError(f"`requirements={files!r:.80}` takes a list of paths")
    return [os.fspath(path) for path in files]


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"cannot read the requirements in `{path}`: {error}") from None


def _dependencies(path: str, extras: Sequence[str]) -> list[str]:
    """What a `pyproject.toml` says its project needs."""
    from squall.config import parse_toml  # pathlib, which it needs, is not for every program

    try:
        project = parse_toml(_read_text(path)).get("project", {})
    except ValueError as error:
        raise InvalidError(f"cannot read the dependencies in `{path}`: {error}") from None
    found = list(project.get("dependencies", []))
    optional = project.get("optional-dependencies", {})
    for extra in [extras] if isinstance(extras, str) else extras:
        if extra not in optional:
            raise InvalidError(
                f"`{path}` has no optional dependencies `{extra}`", hint=f"it has: {', '.join(optional) or 'none'}"
            )
        found += optional[extra]
    return found


def _module_path(module: str) -> tuple[str, bool]:
    """Where a module's source is, and whether it is a package."""
    import importlib.util

    if not module.isidentifier():
        raise InvalidError(
            f"`{module[:80]}` is not the name of a module", hint="give the top-level name, as in `import helpers`"
        )
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.submodule_search_locations:
        return next(iter(spec.submodule_search_locations)), True
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise InvalidError(f"there is no Python source of module `{module}` on the import path")
    return spec.origin, False


def _pack_function(
    raw_f: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, Any]
) -> tuple[bytes, str, Callable[[], bytes]]:
    """The packed arguments, a digest of all that decides what the function does, and how to pack the function."""
    from squall.client import blob_digest
    from squall.protocol import payload as payloads

    name = f"`{getattr(raw_f, '__name__', 'function')}`"
    packed = payloads.pack_by_value((args, kwargs), f"the arguments of {name}")
    tag = blob_digest(packed + _essence(raw_f, set()))
    return packed, tag, functools.partial(payloads.pack_by_value, raw_f, f"function {name}")


def _essence(function: Any, seen: set[int]) -> bytes:
    """Source of a function and of the functions it refers to, and the values of its other globals."""
    import inspect

    from squall.protocol import payload as payloads

    if id(function) in seen:
        return b""
    seen.add(id(function))
    try:
        source = inspect.getsource(function).encode()
    except (OSError, TypeError):
        return payloads.pack_by_value(function, "a function")
    parts = [source]
    code = getattr(function, "__code__", None)
    named = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__} if code else {}
    for name, value in sorted(named.items()):
        if inspect.isfunction(value) or inspect.isclass(value):  # by value a class is never the same bytes twice
            parts.append(_essence(value, seen))
        elif inspect.ismodule(value):
            parts.append(value.__name__.encode())
        else:
            with contextlib.suppress(Exception):  # what cannot be packed is told when the function is
                parts.append(name.encode() + payloads.pack_by_value(value, name))
    return b"\0".join(parts)
