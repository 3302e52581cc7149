"""What `ChatCoPe` is made of: its user, messages, tools, structured output and replies."""
