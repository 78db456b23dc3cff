"""Image: the root file system a function's containers see.

This release knows one, `Image.host()`: this machine's system directories and the Python environment Squall runs
with, read-only. Build steps and other bases are refused by name, so that a program that needs them says so at once.
Tested in `tests/unit/test_options.py`.
"""

from __future__ import annotations

from typing import Any, NoReturn

from squall.exception import InvalidError
from squall.protocol.messages import ImageSpec

_NOT_YET = frozenset(
    {
        "debian_slim",
        "from_registry",
        "from_dockerfile",
        "from_aws_ecr",
        "from_gcp_artifact_registry",
        "from_name",
        "from_id",
        "from_scratch",
        "micromamba",
        "pip_install",
        "uv_pip_install",
        "pip_install_from_requirements",
        "pip_install_from_pyproject",
        "uv_sync",
        "poetry_install_from_file",
        "pip_install_private_repos",
        "apt_install",
        "run_commands",
        "run_function",
        "dockerfile_commands",
        "env",
        "workdir",
        "shell",
        "entrypoint",
        "cmd",
        "add_local_file",
        "add_local_dir",
        "add_local_python_source",
        "imports",
        "pipe",
        "publish",
        "build",
    }
)


def _refuse(name: str) -> NoReturn:
    if name in _NOT_YET:
        raise InvalidError(
            f"`Image.{name}` is not available in this release",
            hint="use `squall.Image.host()`, which shows the packages installed beside Squall",
        )
    raise AttributeError(f"`Image` has no attribute `{name}`")


class _ImageMeta(type):
    def __getattr__(cls, name: str) -> Any:
        _refuse(name)


class Image(metaclass=_ImageMeta):
    """What a container's root file system holds; made by `Image.host()`.

    This release has no other: build steps and other bases raise InvalidError.

    Example:

        app = squall.App("hello", image=squall.Image.host())
    """

    def __init__(self, spec: ImageSpec) -> None:
        self._spec = spec

    @classmethod
    def host(cls) -> Image:
        """This machine's system directories and the Python environment Squall runs with, read-only.

        `pip install` a package beside Squall and your functions can import it. `docs/guide/environment.md` says what
        is shown and what is hidden.
        """
        return cls(ImageSpec(kind="host"))

    def __getattr__(self, name: str) -> Any:
        _refuse(name)

    def __repr__(self) -> str:
        return f"Image.{self._spec.kind}()"
