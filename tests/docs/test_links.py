"""Links of the documentation lead somewhere, and no page names a machine or a registry that is not everybody's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.markdown import PAGES, ROOT, anchors, links

_MACHINE = re.compile(
    r"/(?:home|Users)/(?!user\b|me\b)\w|/root/\.|(?:localhost|127\.0\.0\.1):\d|\b[\w-]+\.(?:internal|corp|lan)\b"
)
_FREE_OF = ("docs/performance.md",)
"""Pages written elsewhere and later, which may be linked before they are there."""


def target_of(page: Path, link: str) -> tuple[Path, str]:
    path, _, anchor = link.partition("#")
    return ((page.parent / path).resolve() if path else page), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for link in links(page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, anchor = target_of(page, link)
        if str(path.relative_to(ROOT)) in _FREE_OF:
            continue
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_no_machine(page: Path) -> None:
    assert _MACHINE.findall(page.read_text()) == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    pending = [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        pending += [target_of(page, link)[0] for link in links(page.read_text()) if "://" not in link]
    docs = {page for page in PAGES if ROOT / "docs" in page.parents}
    assert [str(page.relative_to(ROOT)) for page in sorted(docs - seen)] == []
