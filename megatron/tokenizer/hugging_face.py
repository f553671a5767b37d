# SPDX-License-Identifier: Apache-2.0
"""Tokenizers run by the `tokenizers` library: HFTokenizer, GPT2BPETokenizer, HFGPT2Tokenizer, and ids with the characters
that each stands for."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from megatron.errors import DataError
from megatron.hub.client import STARTING, snapshot
from megatron.tokenizer.tokenizer import RaggedIds, Tokenizer, TokenizerKind, digest_of, existing, require_encodable, spans

# Looked up among the tokenizer's own special tokens, in this order, when no file names the token.
EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "<|eot_id|>")
PAD_NAMES = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>")
# Characters of text whose encodings are held at once.
AT_A_TIME = 2**20
HUB_FILES = ["tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/*"]
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class EngineTokenizer(Tokenizer):
    """A `tokenizers` pipeline with its special ids."""

    def __init__(self, engine: Engine, *, kind: TokenizerKind, eod: int, pad: int | None, bos: int | None, digest: str) -> None:
        # Limits saved inside a tokenizer.json would silently cut or pad documents.
        engine.no_truncation()
        engine.no_padding()
        self._engine = engine
        self.name, self.digest = kind.value, digest
        self.eod, self.pad, self.bos = eod, pad, bos
        # Ids may have gaps; the embedding needs a row for the largest.
        self.vocab_size = max(engine.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of one text. Text that spells a special token becomes that token; a post-processor of the file
        (for instance one that puts BOS in front) is applied."""
        try:
            return list(self._engine.encode(text).ids)
        except TypeError:
            require_encodable([text])
            raise

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order."""
        return [list(encoding.ids) for encoding in self._encodings(texts)]

    def encode_ragged(self, texts: Sequence[str]) -> RaggedIds:
        """Ids of several texts, in one array."""
        # An array of the standard library grows in place: nothing is held twice.
        ids = array("I")
        sizes = np.empty(len(texts), dtype=np.int32)
        for i, encoding in enumerate(self._encodings(texts)):
            some = encoding.ids
            ids.extend(some)
            sizes[i] = len(some)
        return RaggedIds(np.frombuffer(ids, dtype=np.uint32) if ids else np.zeros(0, np.uint32), sizes)

    def _encodings(self, texts: Sequence[str]) -> Iterator[Any]:
        """Encodings weigh many times their text, so that only those of some texts are there at a time."""
        for first, last in spans(texts, AT_A_TIME):
            try:
                yield from self._engine.encode_batch_fast(list(texts[first:last]))
            except TypeError:
                require_encodable(texts[first:last], first)
                raise

    def content(self) -> str:
        """This tokenizer as a tokenizer.json, changes since it was opened included."""
        return str(self._engine.to_str())

    def affixes(self) -> tuple[list[int], list[int]]:
        """Ids that the post-processor puts before and behind every text."""
        bare = self._engine.encode("a", add_special_tokens=False).ids
        whole = self._engine.encode("a").ids
        before = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
        return whole[:before], whole[before + len(bare) :]

    def tokens(self) -> list[str]:
        """Every added token, and the texts of eod, pad and bos."""
        added = [token.content for token in self._engine.get_added_tokens_decoder().values()]
        roles = [self._engine.id_to_token(number) for number in (self.eod, self.pad, self.bos) if number is not None]
        return list(dict.fromkeys([*added, *(text for text in roles if text)]))

    def whole_words(self) -> list[str]:
        """The added tokens that count only where no letter touches them."""
        return [token.content for token in self._engine.get_added_tokens_decoder().values() if token.single_word]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; ids beyond the vocabulary (padding rows of the embedding) give nothing."""
        return str(self._engine.decode(list(ids), skip_special_tokens=False))


def open_hf(vocab_file: str | None) -> EngineTokenizer:
    """HFTokenizer: a tokenizer.json, or a folder that holds one.

    Special tokens come from tokenizer_config.json or special_tokens_map.json beside it, else from the common
    names among the file's own special tokens. Raises DataError when no end-of-document token can be found.
    """
    fix = "give a tokenizer.json (or the folder that holds one); `prepare_data.py` and `tools/tokenizer/train_tokenizer.py` write one"
    path = existing(vocab_file, "vocab_file", kind=TokenizerKind.HF.value, fix=fix)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise DataError(
            f"HFTokenizer: the folder {path.parent} holds no tokenizer.json", where="vocab_file", fix=_other_family(path.parent)
        )
    engine = _load(path)
    declared = declared_tokens(path.parent)
    sides = [side for name in SIDE_FILES if (side := path.parent / name).exists()]
    return _with_declared(TokenizerKind.HF, engine, declared, [path, *sides])


def open_gpt2_bpe(vocab_file: str | None, merge_file: str | None) -> EngineTokenizer:
    """GPT2BPETokenizer: GPT-2's byte-level BPE (Radford et al. 2019) from vocab.json and merges.txt.

    As in the reference, `<|endoftext|>` inside a text is ordinary text here, never the token.
    """
    kind = TokenizerKind.GPT2_BPE
    fix = "give the vocab.json and merges.txt of a GPT-2 tokenizer, or use `tokenizer_type: HFTokenizer` with a tokenizer.json"
    vocab_path = existing(vocab_file, "vocab_file", kind=kind.value, fix=fix)
    merge_path = existing(merge_file, "merge_file", kind=kind.value, fix=fix)
    engine = _from_merges(vocab_path, merge_path)
    return EngineTokenizer(
        engine,
        kind=kind,
        eod=_required(engine.token_to_id(EOD_NAMES[0]), vocab_path),
        pad=engine.token_to_id(PAD_NAMES[0]),
        bos=None,
        digest=digest_of(vocab_path, merge_path),
    )


def open_hf_gpt2(vocab_file: str | None) -> EngineTokenizer:
    """HFGPT2Tokenizer: a GPT-2 tokenizer folder (tokenizer.json, or vocab.json and merges.txt), or a Hub name.

    `<|padding|>` is added at the end when the tokenizer has no padding token, as in the reference.
    """
    folder = Path(vocab_file).expanduser() if vocab_file else None
    if folder is None or not folder.exists():
        folder = from_hub(vocab_file or "gpt2")
    if folder.is_file():
        folder = folder.parent
    if (folder / "tokenizer.json").exists():
        files = [folder / "tokenizer.json"]
        engine = _load(files[0])
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        files = [folder / "vocab.json", folder / "merges.txt"]
        engine = _from_merges(files[0], files[1])
        engine.add_special_tokens([AddedToken(EOD_NAMES[0], special=True)])
    else:
        raise DataError(
            f"HFGPT2Tokenizer: {folder} holds neither tokenizer.json nor vocab.json with merges.txt",
            where="vocab_file",
            fix="give the folder of a saved GPT-2 tokenizer",
        )
    declared = declared_tokens(folder)
    if _special(engine, declared, "pad_token", PAD_NAMES) is None:
        engine.add_special_tokens([PAD_NAMES[0]])
    return _with_declared(TokenizerKind.HF_GPT2, engine, declared, files)


def _with_declared(kind: TokenizerKind, engine: Engine, declared: Mapping[str, str], files: Sequence[Path]) -> EngineTokenizer:
    return EngineTokenizer(
        engine,
        kind=kind,
        eod=_required(_special(engine, declared, "eos_token", EOD_NAMES), files[0]),
        pad=_special(engine, declared, "pad_token", PAD_NAMES),
        bos=_special(engine, declared, "bos_token", BOS_NAMES),
        digest=digest_of(*files),
    )


def _load(path: Path) -> Engine:
    try:
        return Engine.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of a file
        raise DataError(
            f"{path} is not a tokenizer.json: {error}",
            where="vocab_file",
            fix="download or train it again; an empty file means a broken download",
        ) from error


def _from_merges(vocab: Path, merges: Path) -> Engine:
    try:
        engine = Engine(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # as above
        raise DataError(
            f"{vocab} and {merges} are not a BPE vocabulary: {error}", where="vocab_file, merge_file", fix="download them again"
        ) from error
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    return engine


def declared_tokens(folder: Path) -> dict[str, Any]:
    """Special tokens by role (`eos_token`, ...) as the files beside a tokenizer.json name them; `additional_special_tokens` is a list."""
    found: dict[str, Any] = {}
    for name in reversed(SIDE_FILES):  # tokenizer_config.json wins
        content = read_object(folder / name) if (folder / name).exists() else {}
        found |= {role: token for role in ROLES if (token := _token(content.get(role))) is not None}
        if more := content.get("additional_special_tokens"):
            found["additional_special_tokens"] = [_token(token) for token in more]
    return found


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in one of a tokenizer's files. Raises DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}", where=str(path), fix="download or write it again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", where=str(path), fix="give a file in UTF-8") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object", where=str(path), fix="download or write it again")
    return content


def _token(value: Any) -> str | None:
    token = value.get("content") if isinstance(value, Mapping) else value
    return token if isinstance(token, str) else None


def _special(engine: Engine, declared: Mapping[str, str], role: str, names: Sequence[str]) -> int | None:
    if role in declared:
        found: int | None = engine.token_to_id(declared[role])
        if found is None:
            raise DataError(
                f"{role} {declared[role]!r} is not in the vocabulary",
                where=", ".join(SIDE_FILES),
                fix="the files belong to different tokenizers: use one folder per tokenizer",
            )
        return found
    own = {token.content: number for number, token in engine.get_added_tokens_decoder().items() if token.special}
    return next((own[name] for name in names if name in own), None)


def _required(eod: int | None, path: Path) -> int:
    if eod is None:
        raise DataError(
            f"{path}: no end-of-document token among the tokenizer's special tokens",
            where="vocab_file",
            fix=f'name it in a tokenizer_config.json beside the file, e.g. {{"eos_token": "..."}}; known names: {", ".join(EOD_NAMES)}',
        )
    return eod


def _other_family(folder: Path) -> str:
    if (folder / "merges.txt").exists():
        return f"use `tokenizer_type: GPT2BPETokenizer` with vocab_file {folder / 'vocab.json'} and merge_file {folder / 'merges.txt'}"
    models_here = sorted(folder.glob("*.model"))
    if models_here:
        return f"use `tokenizer_type: SPMTokenizer` with vocab_file {models_here[0]}"
    return "give the path of a tokenizer.json"


def from_hub(name: str, kind: str = "HFGPT2Tokenizer", where: str = "vocab_file") -> Path:
    """The folder of a tokenizer of the Hub, its chat template included. Raises DataError where there is none."""
    fix = f"{kind}: give the folder of a saved tokenizer; offline, download it first"
    return snapshot(name, HUB_FILES, folders=True, where=where, fix=fix, patience=STARTING)


class Spans(NamedTuple):
    """ids [n] int32 of one text; token i stands for the characters starts[i] to ends[i] (several tokens may share a character)."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class SpanTokenizer:
    """A `tokenizer.json` without its post-processor: no BOS is put in front, and no space is cut from a token's characters.

    Text that spells a special token becomes that token, as chat templates expect. `special`: the ids of those.
    """

    def __init__(self, path: str) -> None:
        plain = open_hf(path)
        self.eod = plain.eod
        self.vocab_size = plain.vocab_size
        self.digest = plain.digest
        self._engine = Engine.from_str(plain.content())
        self._engine.post_processor = None
        self.special = frozenset(number for number, token in self._engine.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> Spans:
        """One text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Spans]:
        """Several texts, in order. Every text must be encodable."""
        return [_spans(encoding) for encoding in self._encodings(self._engine.encode_batch, texts)]

    def encode_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Only the ids of several texts, which takes half the time."""
        return [np.array(encoding.ids, dtype=np.int32) for encoding in self._encodings(self._engine.encode_batch_fast, texts)]

    def _encodings(self, encode: Callable[..., Any], texts: Sequence[str]) -> Iterator[Any]:
        for first, last in spans(texts, AT_A_TIME):
            yield from encode(list(texts[first:last]), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens written out."""
        return str(self._engine.decode([int(number) for number in ids], skip_special_tokens=False))

    def is_space(self, number: int) -> bool:
        """Whether the token is nothing but white space."""
        return self.decode([number]).isspace()


def _spans(encoding: Any) -> Spans:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return Spans(np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])
