"""Prints the size of modules and functions and the share of comments, per room of the package."""

from __future__ import annotations

import ast
import statistics
import tokenize
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "squall"


def function_lengths(tree: ast.AST) -> list[int]:
    """Lines of each function, its docstring left out."""
    lengths = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                doc = node.body[0]
                length -= (doc.end_lineno or doc.lineno) - doc.lineno + 1
            lengths.append(length)
    return lengths


def comment_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(file.readline))


def p90(values: list[int]) -> int:
    return sorted(values)[int(len(values) * 0.9)] if values else 0


def main() -> None:
    rooms: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        rooms[relative.parts[0] if len(relative.parts) > 1 else "(nouns)"].append(path)
    rooms["all"] = [path for paths in list(rooms.values()) for path in paths]
    print(
        f"{'room':<12}{'modules':>8}{'lines':>8}{'median':>8}{'max':>6}{'fn med':>8}{'p90':>5}{'max':>5}{'# /100':>8}"
    )
    for room, paths in rooms.items():
        sizes = [len(path.read_text().splitlines()) for path in paths]
        functions = [n for path in paths for n in function_lengths(ast.parse(path.read_text()))]
        comments = 100 * sum(map(comment_lines, paths)) / max(1, sum(sizes))
        middle = statistics.median(functions) if functions else 0
        print(
            f"{room:<12}{len(paths):>8}{sum(sizes):>8}{statistics.median(sizes):>8.0f}{max(sizes):>6}"
            f"{middle:>8.0f}{p90(functions):>5}{max(functions, default=0):>5}{comments:>8.1f}"
        )


if __name__ == "__main__":
    main()
