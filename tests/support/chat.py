# SPDX-License-Identifier: Apache-2.0
"""Tokenizer folders with public-style chat templates for tests. Knows what each template trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATES = GOLDEN / "chat" / "templates"
SPECIAL = """<|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <s> </s> <bos>
<start_of_turn> <end_of_turn> <eos> <|User|> <|Assistant|> <begin> <end> <|user|> <|assistant|> <|system|>""".split()


class Style(NamedTuple):
    """bos and eos of a template's models; `trained` is the text that must be trained of one assistant content, `tail` what
    must be appended to the whole; system: whether the template takes a system turn."""

    bos: str
    eos: str
    trained: Callable[[str], str]
    tail: str = ""
    system: bool = True


STYLES = {
    "chatml": Style("<|endoftext|>", "<|im_end|>", lambda content: content + "<|im_end|>\n"),
    "llama3": Style("<|begin_of_text|>", "<|eot_id|>", lambda content: content.strip() + "<|eot_id|>"),
    "zephyr": Style("<s>", "</s>", lambda content: content + "</s>\n"),
    "mistral": Style("<s>", "</s>", lambda content: " " + content + "</s>"),
    "olmo": Style("<|endoftext|>", "<|endoftext|>", lambda content: content + "<|endoftext|>"),
    "gemma": Style("<bos>", "<eos>", lambda content: content.strip() + "<end_of_turn>\n", "<eos>", system=False),
    "deepseek": Style("<begin>", "<end>", lambda content: content.split("</think>")[-1] + "<end>"),
    "qwen3": Style("<|endoftext|>", "<|im_end|>", lambda content: content + "<|im_end|>\n"),
    "marked": Style("<|endoftext|>", "<|im_end|>", lambda content: content + "<|im_end|>"),
    "tools": Style("<|endoftext|>", "<|im_end|>", lambda content: content + "<|im_end|>\n"),
}


def chat_folder(folder: Path, name: str, **more: Any) -> Path:
    """A tokenizer folder with the golden vocabulary, every special token of the templates, and one template."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = Tokenizer.from_file(str(GOLDEN / "tokenizer" / "tokenizer.json"))
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    engine.save(str(folder / "tokenizer.json"))
    style = STYLES[name]
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    config: Mapping[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": style.bos,
        "eos_token": style.eos,
        "chat_template": template,
        **more,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """user, assistant, user, ... after the system turn, if any."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)]
