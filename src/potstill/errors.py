"""Every error that the user can fix, as one tree of exceptions.

Each message is one line: what was found, what is needed, what to do. The command line prints it and
exits with status 2.
"""


class PotstillError(Exception):
    """The base class of every error that the library raises on purpose."""


class ConfigError(PotstillError):
    """A setting does not exist or has an invalid value."""


class ModelError(PotstillError):
    """A model cannot be opened, or does not meet the requirements."""


class ModelNotFound(ModelError):
    """There is no such model, or no network to look for it."""


class UnsafeWeights(ModelError):
    """There are only pickled weights, or the model needs to run its own code."""


class DataError(PotstillError):
    """A file is missing, a row is malformed, or no usable row is left."""


class ChatTemplateError(DataError):
    """A chat template is missing or loses the assistant's text."""


class ServerError(PotstillError):
    """A server does not answer, or does not have a required feature."""


class VocabularyMismatch(PotstillError):
    """Teacher and student do not share their tokens."""


class OpaqueTokenizer(PotstillError):
    """The bytes of a tokenizer's tokens are unknown."""


class RunFolderError(PotstillError):
    """An output folder is not empty, is not a run, or cannot be written."""


class NonFiniteLoss(PotstillError):
    """Training met a NaN or an infinity."""


class CollapsedRollouts(PotstillError):
    """The student's own answers are empty or repeat themselves."""


class SelfCheckFailed(PotstillError):
    """The self-check before the first step found a wrong loss."""
