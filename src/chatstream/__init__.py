"""ChatStream: a queue and an exact limit in front of text generation."""
