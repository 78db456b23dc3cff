"""Image: the root file system a function's containers see, written as a recipe.

An `Image` is immutable and lazy: each method gives a new one with a step more, and nothing happens until an app that
uses it runs, or `.build()` is called. Then the steps whose layers are missing are built, in containers, on the node.
Local files named in steps are read at that moment. What a step may say is checked where it is written, by
`protocol.images`. Tested in `tests/unit/test_image.py` and `tests/integration/test_images.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from squall.exception import InvalidError
from squall.protocol.messages import ImageSpec, ImageStep

if TYPE_CHECKING:
    from squall.client import Output

_NOT_YET = frozenset(
    {
        "from_registry",
        "from_dockerfile",
        "from_aws_ecr",
        "from_gcp_artifact_registry",
        "from_name",
        "from_id",
        "from_scratch",
        "micromamba",
        "pip_install_from_pyproject",
        "uv_sync",
        "poetry_install_from_file",
        "pip_install_private_repos",
        "run_function",
        "dockerfile_commands",
        "shell",
        "entrypoint",
        "cmd",
        "add_local_file",
        "add_local_dir",
        "add_local_python_source",
        "imports",
        "pipe",
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

        image = squall.Image.debian_slim().apt_install("git").uv_pip_install("numpy", "pandas")
        app = squall.App("tables", image=image)
    """

    def __init__(self, parts: tuple[_Part, ...] = (), *, kind: str = "host") -> None:
        self._parts = parts
        self._kind = kind

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

    # -- commands

    def run_commands(self, *commands: str | Sequence[str], force_build: bool = False, **later: object) -> Image:
        """Run shell commands, each in a shell of its own, in order; the first that fails ends the build.

        They run as root of the image, reach the internet, and see no file of yours. `force_build=True` runs them
        again, with all later steps, even though nothing changed.

        Example:

            image = squall.Image.debian_slim().run_commands("echo hello > /etc/greeting")
        """
        return self._with("run", {"commands": _words("run_commands", commands)}, force_build, later)

    def apt_install(self, *packages: str | Sequence[str], force_build: bool = False, **later: object) -> Image:
        """Install Debian packages, without what they merely recommend.

        Example:

            image = squall.Image.debian_slim().apt_install("git", "curl")
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

            image = squall.Image.debian_slim().uv_pip_install("numpy", "pandas")
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

            image = squall.Image.debian_slim().pip_install("requests==2.32.3")
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

            image = squall.Image.debian_slim().pip_install_from_requirements("requirements.txt")
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

    # -- what later steps and containers see

    def env(self, variables: Mapping[str, str]) -> Image:
        """Set environment variables for later steps and for containers. Not for secrets: they become part of the
        image's recipe.

        Example:

            image = squall.Image.debian_slim().env({"TZ": "Europe/Berlin"})
        """
        if not isinstance(variables, Mapping) or not variables:
            raise InvalidError(f"`Image.env({variables!r:.80})` takes a dict of strings")
        return self._with("env", {"variables": dict(variables)}, False, {})

    def workdir(self, path: str) -> Image:
        """The directory that later steps and containers start in; made when it is missing.

        Example:

            image = squall.Image.debian_slim().workdir("/work")
        """
        return self._with("workdir", {"path": str(path)}, False, {})

    # -- building

    def build(self, output: Output | None = None) -> Image:
        """Build now what is missing, instead of when an app that uses it runs; returns the image.

        `output` gets what the steps write, as in `App.run`. Raises BuildError when a step fails.

        Example:

            image = squall.Image.debian_slim().uv_pip_install("numpy").build()
        """
        from squall._session import build_image

        build_image(self, output)
        return self

    # -- for the session

    @property
    def _spec(self) -> ImageSpec:
        """Stands for the image in a function's spec until it is built."""
        return ImageSpec(kind=self._kind)

    def _resolve(self) -> tuple[ImageSpec, dict[str, bytes]]:
        """The recipe as it is now, with the bytes of local files by their digests."""
        from squall.client import blob_digest
        from squall.protocol.images import check_image, image_id_of

        steps, blobs = [], {}
        for part in self._parts:
            step = part.step
            if part.read is not None:
                data = part.read()
                step = ImageStep(step.kind, step.args, blob_digest(data), step.force)
                blobs[step.blob] = data
            steps.append(step)
        spec = ImageSpec(self._kind, steps, image_id_of(steps) if steps else "")
        check_image(spec)
        return spec, blobs

    def _with(self, kind: str, args: dict[str, Any], force: bool, later: Mapping[str, object]) -> Image:
        from squall.protocol.images import HOST_HINT

        method = _METHODS.get(kind, kind)
        for name in later:
            known = name in _LATER
            raise InvalidError(
                f"`Image.{method}` has no option `{name}`{' in this release' if known else ''}",
                hint="`.env()` sets variables for later steps" if name == "env" else "",
            )
        if self._kind == "host":
            raise InvalidError(f"`Image.{method}` cannot add to `Image.host()`", hint=HOST_HINT)
        step = _checked(ImageStep(kind, args, force=force))
        return Image((*self._parts, _Part(step)), kind=self._kind)

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
}


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
