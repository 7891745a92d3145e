"""Talking to a model: the chat in the terminal."""
