"""Reads pages with a real OCR model, page by page in parallel, and counts what it got right.

Pages of a known text (a licence that every Debian has) are drawn as a scanner would deliver them: slightly turned, with
grain. Then they are read back. Both run in containers, on an image that holds the model and what it needs; nothing
need be installed here. `--save page.png` keeps the first page to look at.

    squall run examples/ocr.py
    squall run examples/ocr.py --pages 20 --text README.md --save page.png
"""

from __future__ import annotations

import difflib
import io
import random
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import squall

# The model's package asks for OpenCV with windows, which needs a desktop's libraries. The second step lays the same
# module without windows over it.
image = (
    squall.Image.debian_slim("3.11")
    .uv_pip_install("rapidocr-onnxruntime==1.4.4", "pillow")
    .uv_pip_install("opencv-python-headless")
)
app = squall.App("ocr", image=image)

with image.imports():
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

LINES = 24
COLUMNS = 64
TOP = 30
PITCH = 34
FIRST = TOP + 14
"""Where the middle of the first line is drawn, in pixels from the top, and how far it is to the next."""


@app.function(cpu=1, memory=512)
def draw(number: int, lines: list[str]) -> tuple[int, list[str], bytes]:
    """A page of text as a scanner would see it, a PNG."""
    page = Image.new("L", (1000, 2 * TOP + PITCH * len(lines)), 255)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=24)
    for row, line in enumerate(lines):
        pen.text((50, TOP + PITCH * row), line, font=font, fill=20)
    chance = np.random.default_rng(number)
    page = page.rotate(random.Random(number).uniform(-0.6, 0.6), fillcolor=255, resample=Image.Resampling.BICUBIC)
    grainy = np.asarray(page) + chance.normal(0, 12, (page.height, page.width))
    file = io.BytesIO()
    Image.fromarray(grainy.clip(0, 255).astype("uint8")).save(file, "PNG")
    return number, lines, file.getvalue()


@app.cls(cpu=1, memory=1024, max_containers=4)
class Reader:
    @squall.enter()
    def load(self) -> None:
        """Once in each container. One thread each: the pages already keep all cores busy."""
        from rapidocr_onnxruntime import RapidOCR

        self.engine: Any = RapidOCR(intra_op_num_threads=1, rec_batch_num=1)

    @squall.method()
    def read(self, number: int, lines: list[str], page: bytes) -> dict[str, Any]:
        """The text found in the place of each line that was drawn."""
        began = time.perf_counter()
        found, _ = self.engine(page, use_cls=False)  # without the model that finds out which side is up
        rows: dict[int, list[tuple[float, str]]] = {}
        for corners, text, _ in found or []:  # the corners of the box from top left on
            middle = (corners[0][1] + corners[2][1]) / 2
            rows.setdefault(round((middle - FIRST) / PITCH), []).append((corners[0][0], str(text)))
        return {
            "page": number,
            "lines": lines,
            "found": [" ".join(text for _, text in sorted(rows.get(row, []))) for row in range(len(lines))],
            "seconds": time.perf_counter() - began,
        }


def paginate(text: str, pages: int) -> list[list[str]]:
    """The first `pages` pages of the text, its paragraphs wrapped."""
    lines = [line for part in text.split("\n\n") for line in textwrap.wrap(" ".join(part.split()), COLUMNS)]
    return [lines[start : start + LINES] for start in range(0, len(lines), LINES)][:pages]


def accuracy(drawn: str, read: str) -> float:
    """The share of characters that were read as they were drawn; spaces, which OCR is free with, do not count."""
    drawn, read = "".join(drawn.split()), "".join(read.split())
    same = sum(block.size for block in difflib.SequenceMatcher(None, drawn, read, autojunk=False).get_matching_blocks())
    return same / max(1, len(drawn), len(read))


@app.local_entrypoint()
def main(pages: int = 8, text: str = "/usr/share/common-licenses/Apache-2.0", save: str = "") -> None:
    wanted = paginate(Path(text).read_text(), pages)
    if not wanted:
        raise SystemExit(f"there is no text in {text}")
    print(f"{len(wanted)} pages of {text}", file=sys.stderr)
    began = time.perf_counter()
    # The one map feeds the other: a page is read as soon as it is drawn.
    drawn = draw.starmap(enumerate(wanted, 1))
    if save:
        drawn = kept(drawn, Path(save))
    results: list[dict[str, Any]] = []
    print(f"{'page':>4}{'lines':>7}{'characters':>12}{'right':>9}{'seconds':>9}")
    for result in Reader().read.starmap(drawn):
        results.append(result)
        result["right"] = accuracy("".join(result["lines"]), "".join(result["found"]))
        size = sum(map(len, result["lines"]))
        print(
            f"{result['page']:>4}{len(result['lines']):>7}{size:>12}{result['right']:>9.2%}{result['seconds']:>9.2f}",
            flush=True,
        )
    took = time.perf_counter() - began
    print_differences(results)
    right = sum(result["right"] for result in results) / len(results)
    print(
        f"\n{right:.2%} of the characters right; {sum(r['seconds'] for r in results):.1f} s of reading in {took:.1f} s"
    )


def kept(drawn: Any, path: Path) -> Any:
    """The pages, the first of which is written to a file as it passes."""
    for page in drawn:
        if page[0] == 1:
            path.write_bytes(page[2])
        yield page


def print_differences(results: list[dict[str, Any]], limit: int = 5) -> None:
    """Some lines that were not read as they were drawn."""
    wrong = []
    for result in results:
        for drawn, read in zip(result["lines"], result["found"], strict=True):
            if "".join(drawn.split()) != "".join(read.split()):
                wrong.append((result["page"], drawn, read))
    if wrong:
        print(f"\n{len(wrong)} lines were misread" + (", for example" if len(wrong) > limit else ""))
    for page, drawn, read in wrong[:limit]:
        print(f"  page {page}   drawn: {drawn}\n           read:  {read}")
