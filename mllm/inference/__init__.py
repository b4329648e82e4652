"""Answers from a model: streamed to a chat, or to whole question sets, scored and resumed."""
