"""A parameter sweep with scikit-learn: every candidate cross-validated in a container, the best one checked at the end.

The data are the handwritten digits that scikit-learn ships. Each setting of three kinds of model is one input, so the
sweep is as wide as there are containers; results are shown as they come.

    squall run examples/sweep.py
    squall run examples/sweep.py --folds 3 --width 2
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import squall

image = squall.Image.debian_slim("3.11").uv_pip_install("scikit-learn")
app = squall.App("sweep", image=image)

with image.imports():
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_score, train_test_split
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

Setting = dict[str, Any]

GRIDS: dict[str, dict[str, list[Any]]] = {
    "support vectors": {"C": [0.1, 1, 10, 100], "gamma": [0.0001, 0.0003, 0.001, 0.003]},
    "nearest neighbours": {"n_neighbors": [1, 3, 5, 9], "weights": ["uniform", "distance"]},
    "random forest": {"n_estimators": [20, 50, 100], "max_depth": [6, 12, None]},
}


def settings(width: int) -> Iterator[tuple[str, Setting]]:
    """Each model with each combination of its parameters, `width` values of each."""
    for model, grid in GRIDS.items():
        for values in itertools.product(*[candidates[:width] for candidates in grid.values()]):
            yield model, dict(zip(grid, values, strict=True))


def make(model: str, setting: Setting) -> Any:
    if model == "support vectors":
        return SVC(**setting)
    if model == "nearest neighbours":
        return KNeighborsClassifier(**setting)
    return RandomForestClassifier(**setting, random_state=0)


def digits() -> Any:
    """Training images, test images, training labels, test labels; the test ones are not touched by the sweep."""
    return train_test_split(*load_digits(return_X_y=True), test_size=0.25, random_state=0)


@app.function(cpu=1, memory=512, retries=1)
def validate(model: str, setting: Setting, folds: int) -> dict[str, Any]:
    """The mean accuracy of one candidate over `folds` folds of the training images."""
    began = time.perf_counter()
    images, _, labels, _ = digits()
    scores = cross_val_score(make(model, setting), images, labels, cv=folds)
    seconds = time.perf_counter() - began
    # Plain numbers: the program that reads the result need not have numpy.
    return {"model": model, "setting": setting, "score": float(scores.mean()), "seconds": seconds}


@app.function(cpu=1, memory=512)
def check(model: str, setting: Setting) -> float:
    """How a candidate trained on all training images does on the images that no candidate has seen."""
    images, unseen, labels, truth = digits()
    return float(make(model, setting).fit(images, labels).score(unseen, truth))


@app.local_entrypoint()
def main(folds: int = 5, width: int = 4, top: int = 8) -> None:
    candidates = [(model, setting, folds) for model, setting in settings(width)]
    print(f"{len(candidates)} candidates, {folds} folds each", file=sys.stderr)
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    for result in validate.starmap(candidates, order_outputs=False):
        results.append(result)
        if result["score"] == max(r["score"] for r in results):
            print(f"  best of {len(results):2}: {result['score']:.2%}  {described(result)}", file=sys.stderr)
    took = time.perf_counter() - began

    results.sort(key=lambda result: -result["score"])
    print(f"{'accuracy':<10}{'seconds':>8}   candidate")
    for result in results[:top]:
        print(f"{result['score']:<10.2%}{result['seconds']:>8.2f}   {described(result)}")
    best = results[0]
    print(f"\non images no candidate has seen, the best is right in {check.remote(best['model'], best['setting']):.2%}")
    print(f"{sum(r['seconds'] for r in results):.1f} s of work done in {took:.1f} s")


def described(result: dict[str, Any]) -> str:
    return f"{result['model']}, " + ", ".join(f"{name}={value}" for name, value in result["setting"].items())
