"""The former names of `tnllm.generation.conversation` and `tnllm.chat_template`, kept for programs that import them."""

from tnllm.chat_template import split_template
from tnllm.chat_template import stop_strings as opening_stop
from tnllm.generation.conversation import Conversation, message_ids

__all__ = ["Conversation", "message_ids", "opening_stop", "split_template"]
