# SPDX-License-Identifier: Apache-2.0
"""Conversations, preference pairs and their loss masks."""

from megatron.data.chat.masks import Borders, Masking
from megatron.data.chat.pairs import PairSource
from megatron.data.chat.sources import ChatFormat, ChatSource, chat_format

__all__ = ["Borders", "ChatFormat", "ChatSource", "Masking", "PairSource", "chat_format"]
