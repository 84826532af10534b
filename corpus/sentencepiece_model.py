"""Models of SentencePiece (Kudo and Richardson 2018), converted to a tokenizer.json."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

from corpus.huggingface_tokenizer import HuggingFaceTokenizer, config_beside, read_tokenizer_json
from corpus.tokenizer_json import SPACE, Parts
from runtime.console import one_line
from runtime.setting_fields import UserError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of pieces in sentencepiece_model.proto
_UNIGRAM, _BPE = 1, 2  # and of models
# The conversion is compared with SentencePiece's own ids on this text.
_SAMPLE = (
    "The quick brown fox\tjumps over 13 lazy dogs, won't it?\nTwo  spaces,   three; a\u0301 accent,"
    " \u00fcber, \u4e16\u754c, \u0928\u092e\u0938\u094d\u0924\u0947, \U0001f339 "
    "\U0001f469\u200d\U0001f680, \ufb01ne \u2460.\n\n  </s> end "
)


def read_sentencepiece(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a .model file, whose ids are compared with those of SentencePiece on a
    sample of text. They differ only where a unigram model has two splits of a text that are equally
    probable, such as "= ==" and "== =" of "===". Documents end with the token that the file has for
    that (`</s>`). Raises UserError.
    """
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError(
            f"{path}: needs packages: pip install sentencepiece protobuf tokenizers"
        ) from None
    try:
        data = path.read_bytes()
        model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        model.ParseFromString(data)
        original = sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception as reason:  # of protobuf, of SentencePiece, of the file system
        said = one_line(reason, 100)
        raise UserError(f"{path}: is no model of SentencePiece ({said})") from reason
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"{path}: is neither a unigram nor a BPE model; others can't be converted")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"{path}: has spaces at the end of its tokens, which can't be converted")
    end = original.id_to_piece(original.eos_id()) if original.eos_id() >= 0 else ""
    try:
        text = json.dumps(_tokenizer_json(model), ensure_ascii=False)
    except (TypeError, ValueError) as reason:
        raise UserError(f"{path}: a piece or its score is damaged ({str(reason)[:80]})") from reason
    made = read_tokenizer_json(text, str(path), {"eos_token": end, **config_beside(path)})
    wanted, found = original.encode(_SAMPLE), made.encode(_SAMPLE).tolist()
    unigram = model.trainer_spec.model_type == _UNIGRAM
    if wanted != found and not (unigram and _equally_probable(original, wanted, found)):
        where = next(
            (i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]),
            min(len(wanted), len(found)),
        )
        raise UserError(
            f"{path}: converted, it gives other ids than SentencePiece, first for "
            f"{original.decode(wanted[max(where - 2, 0) : where + 3])!r}; tokenize the text with "
            "its own library into 1-D .npy files of ids for --train-npy, with --vocab-size"
        )
    return made


def _equally_probable(original: Any, wanted: list[int], found: list[int]) -> bool:
    """Whether these ids of a unigram model are splits of the same text, and their log probabilities
    differ by no more than rounding: SentencePiece adds them up in float32 and Hugging Face in
    float64, so that each may prefer another one.
    """
    if original.decode(wanted) != original.decode(found):
        return False
    first, second = (math.fsum(map(original.get_score, ids)) for ids in (wanted, found))
    return math.isclose(first, second, rel_tol=1e-6)


def _tokenizer_json(model: Any) -> Parts:
    """The model as the content of a tokenizer.json."""
    pieces, spec = list(model.pieces), model.normalizer_spec
    control = [(i, p.piece) for i, p in enumerate(pieces) if p.type == _CONTROL]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    user_defined = [p.piece for p in pieces if p.type == _USER_DEFINED]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": c, **plain, "special": True} for i, c in control],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(spec)},
        "pre_tokenizer": _alone(user_defined) if user_defined else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _unigram(model) if model.trainer_spec.model_type == _UNIGRAM else _bpe(model),
    }


def _normalizers(spec: Any) -> list[Parts]:
    """SentencePiece's steps before it looks for tokens, in its order."""
    steps: list[Parts] = []
    if spec.precompiled_charsmap:
        coded = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": coded})
    if spec.remove_extra_whitespaces:
        for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE if spec.escape_whitespaces else " "})
    if spec.escape_whitespaces:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def _alone(symbols: list[str]) -> Parts:
    """The split that keeps symbols of the user apart from the text around them."""
    symbols = sorted(symbols, key=len, reverse=True)
    pattern = "|".join("".join(f"\\x{{{ord(c):x}}}" for c in symbol) for symbol in symbols)
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _decoders(model: Any) -> list[Parts]:
    steps: list[Parts] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}] if model.trainer_spec.byte_fallback else []
    steps += [{"type": "Fuse"}]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _unigram(model: Any) -> Parts:
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "vocab": [[p.piece, p.score] for p in model.pieces],
        "byte_fallback": model.trainer_spec.byte_fallback,
    }


def _bpe(model: Any) -> Parts:
    """The merges of a BPE model: it merges those two neighbours whose joint piece has the highest
    score, so each way to make a piece out of two others is a merge, with the rank of its score.
    """
    normal = {p.piece: (-p.score, i) for i, p in enumerate(model.pieces) if p.type == _NORMAL}
    merges = [
        (rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.trainer_spec.unk_piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "ignore_merges": any(p.type == _USER_DEFINED for p in model.pieces),
        "vocab": {p.piece: i for i, p in enumerate(model.pieces)},
        "merges": [[left, right] for _, left, right in sorted(merges)],
    }
