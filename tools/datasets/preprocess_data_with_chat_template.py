#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: conversations and preference pairs into .bin/.idx files with labels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.data.chat.masks import Borders, Masking  # noqa: E402
from megatron.data.chat.pairs import (
    PairSource,  # noqa: E402
    preview,  # noqa: E402
)
from megatron.data.chat.sources import ChatFormat, ChatSource, chat_format  # noqa: E402
from megatron.data.preprocess import flags as shared  # noqa: E402
from megatron.data.preprocess.blocks import BlockStart  # noqa: E402
from megatron.data.preprocess.inputs import find  # noqa: E402
from megatron.data.preprocess.sources import Files  # noqa: E402
from megatron.data.preprocess.writer import write  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = """Renders conversations with the tokenizer's chat template and writes <prefix>_<key>_document, <prefix>_<key>_label_document,
with --reward-key <prefix>_<key>_reward_document (.bin and .idx), and <prefix>_metadata.json. Labels are -100 where nothing is trained.
With --pairs: prompt, chosen and rejected answers, and <prefix>_lengths_document (tokens of prompt, chosen, rejected).
For KTO: --prompt-key prompt --jsonl-keys completion --reward-key label --binary-reward."""
KEYS = ["conversation"]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = ToolParser(prog="preprocess_data_with_chat_template.py", description=ABOUT, add_help=False)
    shared.add_input(flags, keys=KEYS)
    flags.add_argument("--prompt-key", help="the turns under --jsonl-keys answer this prompt (text or turns), which is not trained")
    flags.add_argument("--tools-key", help="key of the tools offered in a conversation, given to the template")
    flags.add_argument("--reward-key", help="key of a number to store with every conversation")
    flags.add_argument("--binary-reward", action="store_true", help="store 1 for true and numbers above 0, else -1")
    flags.add_argument("--pairs", action="store_true", help="records are preference pairs; --jsonl-keys are then chosen and rejected")
    group = flags.add_argument_group("tokenizer and template")
    group.add_argument("--tokenizer-path", required=True, help="folder with tokenizer.json and tokenizer_config.json, or a Hub name")
    group.add_argument("--chat-template", help="Jinja file to use instead of the tokenizer's template")
    group.add_argument("--ftfy", action="store_true", help="fix mis-decoded text with ftfy first")
    group = flags.add_argument_group("what is trained")
    group.add_argument("--generation-role", default="assistant", help="role whose turns are trained (default: assistant)")
    group.add_argument("--only-last", action="store_true", help="train the last turn only")
    group.add_argument("--no-mask", action="store_true", help="write no labels")
    group.add_argument("--for-rm", action="store_true", help="for reward models: one label, on a second end-of-document token")
    group.add_argument(
        "--turn-borders",
        choices=[border.value for border in Borders],
        help="exact: encode the whole text, no character is lost; neox: cut into turns as the reference does "
        "(default: exact for --pairs and for templates with {%% generation %%}, else neox)",
    )
    shared.add_output(flags)
    return flags


def check(given: argparse.Namespace) -> None:
    """Refuse flags that would have no effect."""
    if given.binary_reward and given.reward_key is None:
        raise ConfigError("--binary-reward says how a reward is stored", where="command line", fix="add --reward-key KEY")
    if not given.pairs:
        return
    useless = {
        "--only-last": given.only_last,
        "--no-mask": given.no_mask,
        "--for-rm": given.for_rm,
        "--reward-key": given.reward_key,
        "--turn-borders neox": given.turn_borders == Borders.NEOX.value,
    }
    if wrong := [flag for flag, used in useless.items() if used]:
        raise ConfigError(
            f"--pairs does not go with {' and '.join(wrong)}",
            where="command line",
            fix="leave --pairs out to write both sides as conversations (--jsonl-keys chosen rejected), as for reward models",
        )
    if given.jsonl_keys != KEYS and len(given.jsonl_keys) != 2:
        raise ConfigError("--pairs has two keys", where="--jsonl-keys", fix="for instance --jsonl-keys chosen rejected")


def encoder_of(given: argparse.Namespace, form: ChatFormat) -> ChatSource | PairSource:
    """What the flags ask for."""
    if given.pairs:
        chosen, rejected = ("chosen", "rejected") if given.jsonl_keys == KEYS else given.jsonl_keys
        return PairSource(form, given.prompt_key or "prompt", chosen, rejected, given.generation_role, given.tools_key, given.ftfy)
    marked = form.open_template().marked and given.generation_role == "assistant"
    borders = Borders(given.turn_borders) if given.turn_borders else Borders.EXACT if marked else Borders.NEOX
    masking = Masking(
        role=given.generation_role,
        only_last=given.only_last,
        labels=not given.no_mask,
        reward=given.for_rm,
        borders=borders,
        keep_untrained=borders is Borders.NEOX,
    )
    return ChatSource(
        form,
        tuple(dict.fromkeys(given.jsonl_keys)),
        masking,
        tools_key=given.tools_key,
        reward_key=given.reward_key,
        binary=given.binary_reward,
        prompt_key=given.prompt_key,
        ftfy=given.ftfy,
    )


def columns_of(encoder: ChatSource | PairSource) -> tuple[str, ...]:
    """The keys of a record that are read."""
    if isinstance(encoder, PairSource):
        keys = [encoder.prompt_key, encoder.chosen_key, encoder.rejected_key, encoder.tools_key]
    else:
        keys = [*encoder.keys, encoder.prompt_key, encoder.tools_key, encoder.reward_key]
    return tuple(key for key in keys if key)


def main(argv: list[str]) -> int:
    """Write the files; print what was written."""
    given = parser().parse_args(argv)
    check(given)
    prefix = shared.prefix_of(given)
    form = chat_format(given.tokenizer_path, given.chat_template)
    encoder = encoder_of(given, form)
    source = Files(find(given.input, split=given.split), columns=columns_of(encoder))
    first = next((block.read().records for block in source.blocks(BlockStart())), [])
    for stream, text in preview(encoder.open(), first).items():
        print(f"first {stream}, what is trained in [[ ]]:\n{text}\n")
    print(shared.summary(write(source, encoder, prefix, shared.options(given, **form.about()))))
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=parser().format_help().removeprefix("usage: "), about="", ranks=False, keys=False))
