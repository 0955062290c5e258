"""Defaults that several commands share, each in one place."""

MAX_LENGTH = 1024
"""Tokens at which a conversation is cut."""
ROLLOUT_TOKENS = 128
"""Tokens at which an answer that the student writes while it is trained is cut."""
PASSES = 3
"""Passes over the training data, without max_steps and seconds."""
EVAL_FRACTION = 0.1
"""Share of the data held out for evaluation, without eval_data."""
