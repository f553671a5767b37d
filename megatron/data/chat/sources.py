# SPDX-License-Identifier: Apache-2.0
"""Encoders of conversations: records -> ids, labels and rewards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.chat.masks import Borders, EncodingPlan, Masked, Masking, close, count_trained, masked, plan
from megatron.data.chat.records import answered, fixed, reward_of, talk_of
from megatron.data.chat.template import ChatTemplate, special_tokens, template_sources
from megatron.data.chat.turns import UnmaskableError
from megatron.data.preprocess.encoders import Dropped, EncodedRecords, Fault, Outcome, StreamFormat, gather, text_fixer
from megatron.tokenizer.hugging_face import SpanTokenizer, from_hub

IDS = StreamFormat(np.dtype("<i4"))
REWARDS = StreamFormat(np.dtype("<f4"), integral=np.dtype("<i4"))
NOTHING = "nothing to train"
CUT = "conversations cut as the reference cuts them lose or double characters at a turn's border (--turn-borders exact keeps them)"
CROSSING = "conversations have a token across the border of what is trained: that token is not trained"
ENDLESS = (
    "conversations have a {% generation %} block without the end-of-turn token behind it: the model would not learn to end its turn "
    "(put the token into the block)"
)
KEPT = "conversations have nothing to train, and are kept as the reference keeps them"


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer and its template. Make it with `chat_format`, so that the digest tells what the files say.

    tokenizer: folder (or tokenizer.json); template: file to use instead of the folder's
    moment:    what `strftime_now` tells in templates that ask, ISO 8601
    """

    tokenizer: str
    template: str | None = None
    moment: str | None = None
    digest: str = ""

    def about(self) -> dict[str, Any]:
        """What a dataset's metadata says of it."""
        tokenizer = self.open_tokenizer()
        facts = {"path": self.tokenizer, "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod}
        return {"tokenizer": facts, "chat_template": {"file": self.template, "digest": self.digest, "moment": self.moment}}

    def open_tokenizer(self) -> SpanTokenizer:
        """Open the tokenizer."""
        return SpanTokenizer(self.tokenizer)

    def open_template(self) -> ChatTemplate:
        """Compile the template."""
        sources, variables = _found(self)
        return ChatTemplate(sources, variables, moment=datetime.fromisoformat(self.moment) if self.moment else None)


def chat_format(tokenizer: str, template: str | None = None) -> ChatFormat:
    """The format of a tokenizer folder (or a name on the Hub), or of it with another template file. Raises DataError when there is
    no template."""
    if not Path(tokenizer).expanduser().exists():
        tokenizer = str(from_hub(tokenizer, "--tokenizer-path", "tokenizer"))
    asked = ChatFormat(tokenizer, template)
    sources, variables = _found(asked)
    digest = hashlib.sha256(repr((sorted(sources.items()), sorted(variables.items()))).encode()).hexdigest()[:16]
    # All workers must tell the same day; other templates do not depend on it.
    dated = any("strftime_now" in source for source in sources.values())
    moment = datetime.now().isoformat(timespec="seconds") if dated else None
    return ChatFormat(tokenizer, template, moment, digest)


def _found(form: ChatFormat) -> tuple[dict[str, str], dict[str, Any]]:
    folder = Path(form.tokenizer).expanduser()
    folder = folder.parent if folder.is_file() else folder
    return template_sources(folder, Path(form.template).expanduser() if form.template else None), special_tokens(folder)


@dataclass(frozen=True)
class ChatSource:
    """Conversations under `keys` -> streams `<key>`, `<key>_label` (unless the masking has none), `<key>_reward` (with `reward_key`).

    binary:     rewards are 1 (true, or above 0) and -1, as KTO needs them
    prompt_key: the turns under `keys` answer the prompt under this key, which is not trained
    ftfy:       fix mis-decoded text first
    """

    form: ChatFormat
    keys: tuple[str, ...] = ("conversation",)
    masking: Masking = Masking()
    tools_key: str | None = None
    reward_key: str | None = None
    binary: bool = False
    prompt_key: str | None = None
    ftfy: bool = False

    def open(self) -> ChatEncoder:
        """Open tokenizer and template."""
        return ChatEncoder(self)


class ChatEncoder:
    """See ChatSource. A record of which one conversation has nothing to train is dropped whole, so that streams stay aligned."""

    def __init__(self, source: ChatSource) -> None:
        self.source = source
        self.tokenizer = source.form.open_tokenizer()
        self.template = source.form.open_template()
        self.fix = text_fixer() if source.ftfy else None
        self.streams: dict[str, StreamFormat] = {}
        for key in source.keys:
            self.streams[key] = IDS
            if source.masking.labels:
                self.streams[f"{key}_label"] = IDS
            if source.reward_key is not None:
                self.streams[f"{key}_reward"] = IDS if source.binary else REWARDS

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """Ids, labels and rewards of each record."""
        plans = [self._plans(record) for record in records]
        good = [one for made in plans if not isinstance(made, Fault) for one in made]
        encoded = (close(one, self.tokenizer, reward=self.source.masking.reward) for one in masked(self.tokenizer, good))
        outcomes: list[Outcome] = []
        notes: Counter[str] = Counter()
        trained = 0
        for record, made in zip(records, plans, strict=True):
            if isinstance(made, Fault):
                outcomes.append(made)
                continue
            found = [next(encoded) for _ in made]
            outcome = self._outcome(record, found)
            outcomes.append(outcome)
            if isinstance(outcome, Mapping):
                trained += sum(count_trained(one) for one in found)
                notes.update(self._notes(found))
        batch = gather(outcomes, self.streams, trained=trained if self.source.masking.labels else None)
        batch.notes = notes
        return batch

    def _notes(self, found: Sequence[Masked]) -> list[str]:
        masking = self.source.masking
        notes = []
        if any(one.crossing for one in found):
            notes.append(CUT if masking.borders is Borders.NEOX else CROSSING)
        if any(one.endless for one in found):
            notes.append(ENDLESS)
        if masking.labels and not all(count_trained(one) for one in found):
            notes.append(KEPT)
        return notes

    def _plans(self, record: Mapping[str, Any]) -> list[EncodingPlan] | Fault:
        source, plans = self.source, []
        try:
            for key in source.keys:
                if source.prompt_key is None:
                    talk, first = talk_of(record, key, source.tools_key), 0
                else:
                    talk, first = answered(record, source.prompt_key, key, source.masking.role, source.tools_key)
                plans.append(plan(self.template, fixed(talk, self.fix) if self.fix else talk, source.masking, first=first))
        except UnmaskableError as error:
            return Fault(str(error))
        return plans

    def _outcome(self, record: Mapping[str, Any], encoded: Sequence[Masked]) -> Outcome:
        source = self.source
        found: dict[str, Any] = {}
        if source.masking.labels and not source.masking.keep_untrained and not all(count_trained(one) for one in encoded):
            return Dropped(NOTHING)
        reward = np.zeros(0, "<f4")
        if source.reward_key is not None:
            try:
                reward = reward_of(record.get(source.reward_key), source.reward_key, binary=source.binary)
            except UnmaskableError as error:
                return Fault(str(error))
        for key, one in zip(source.keys, encoded, strict=True):
            values = {key: one.ids, f"{key}_label": one.labels, f"{key}_reward": reward}
            found.update((name, value) for name, value in values.items() if name in self.streams)
        return found
