"""The parts of `ChatCoPe`: its user, messages, tools, structured output, replies, and one call."""
