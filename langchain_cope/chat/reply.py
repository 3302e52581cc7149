"""A part of a reply as a chunk of LangChain's message."""

import uuid
from typing import TYPE_CHECKING

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk

if TYPE_CHECKING:
    from langchain_cope.engine import Part


def message_chunk(part: "Part") -> AIMessageChunk:
    """Return the chunk that adds `part` to a message.

    Thoughts become `additional_kwargs["reasoning_content"]`, which LangChain shows as reasoning
    blocks. A call comes as a chunk with name and id, then as pieces of its arguments. A call that
    was cut, and text between a call's marks that is no call, end up among `invalid_tool_calls`.
    """
    from langchain_cope.engine import THOUGHT, TextPart

    if isinstance(part, TextPart):
        if part.field == THOUGHT:
            return AIMessageChunk(content="", additional_kwargs={"reasoning_content": part.text})
        return AIMessageChunk(content=part.text)
    call_id = f"call_{uuid.uuid4().hex[:24]}" if part.is_first else None
    piece = tool_call_chunk(name=part.name, args=part.arguments, id=call_id, index=part.index)
    return AIMessageChunk(content="", tool_call_chunks=[piece])
