"""Sphinx extension: words that readers search for, and the page that each should find first.

Sphinx's search puts an index entry that equals the query before everything else. A page need not hold the word.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.addnodes import index
from sphinx.transforms import SphinxTransform

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "index": {"": ("licence", "license", "cite", "citation", "repository")},
    "get-started": {"install": ("install", "installation"), "": ("tutorial", "quickstart", "quick start")},
    "saving": {
        "": ("save", "load", "safetensors"),
        "turn-a-data-set-into-codes": ("tokenizer", "tokeniser", "tokenize", "tokenise", "tokens"),
    },
    "resume": {"": ("resume", "checkpoint", "checkpoints", "continue")},
    "training": {
        "many-ranks": ("DDP", "FSDP", "multi-GPU", "distributed", "torchrun"),
        "mixed-precision": ("AMP", "autocast", "bf16", "bfloat16", "fp16", "half precision"),
        "torch-compile": ("compile", "torch.compile"),
        "export": ("ONNX", "export"),
        "accumulated-gradients": ("gradient accumulation",),
        "on-a-slurm-cluster": ("SLURM",),
    },
    "images": {"": ("224", "image size", "data set", "dataset"), "published-sets": ("ChestX-ray14", "CheXpert")},
    "health": {"": ("collapse", "codebook collapse", "dead codes", "perplexity", "usage")},
    "logging": {"weights-biases": ("wandb", "TensorBoard"), "mlflow": ("MLflow",)},
    "evidence": {"": ("results", "accuracy", "AUC")},
    "api/generated/vqssl.fit_codebook": {"": ("k-means", "kmeans")},
}
"""By page and id of a section ("": the whole page): the words."""


class SearchWords(SphinxTransform):
    """Give a page the index entries of its words."""

    default_priority = 500  # before Sphinx collects index entries

    def apply(self, **kwargs: Any) -> None:
        """Add a node of index entries for each section that has words."""
        for section, words in WORDS.get(self.env.docname, {}).items():
            if section and not any(section in node["ids"] for node in self.document.findall(nodes.section)):
                raise ValueError(f"WORDS must name sections, got {section!r}: {self.env.docname} has no such section")
            self.document.insert(0, index(entries=[("single", word, section, "main", None) for word in words]))


def setup(app: Any) -> dict[str, Any]:
    """Register the transform."""
    app.add_transform(SearchWords)
    return {"parallel_read_safe": True}
