"""Everything that can go wrong and that the user can mend, as one tree.

    PotstillError
    ├── ConfigError            a setting that does not exist or does not make sense
    ├── ModelError             a model that cannot be opened, or is not what the work needs
    │   ├── ModelNotFound      nothing there under that name (or no network to look)
    │   └── UnsafeWeights      only pickled weights, or code that would have to be run
    ├── DataError              a missing file, a malformed row, nothing usable left
    │   └── ChatTemplateError  no chat template, or one that loses the assistant's text
    ├── ServerError            no server there, or one that does not do what the work needs
    ├── VocabularyMismatch     teacher and student do not share their tokens
    ├── OpaqueTokenizer        a tokenizer that does not say which bytes its tokens stand for
    ├── RunFolderError         an output folder that is not empty, not a run, or cannot be written
    ├── NonFiniteLoss          training met a NaN or an infinity
    └── SelfCheckFailed        a loss that is not what it says, found out before the first step

Each message is one line: what was found, what is needed, what to do. The command line prints it and exits with status 2.
"""


class PotstillError(Exception):
    """The root: catch this to catch every error the library raises on purpose."""


class ConfigError(PotstillError):
    """A setting that does not exist or does not make sense."""


class ModelError(PotstillError):
    """A model that cannot be opened, or is not what the work needs."""


class ModelNotFound(ModelError):
    """Nothing there under that name, or no network to look."""


class UnsafeWeights(ModelError):
    """Only pickled weights, or code that would have to be run."""


class DataError(PotstillError):
    """A missing file, a malformed row, nothing usable left."""


class ChatTemplateError(DataError):
    """No chat template where one is needed, or one that loses the assistant's text."""


class ServerError(PotstillError):
    """No server there, or one that does not do what the work needs."""


class VocabularyMismatch(PotstillError):
    """Teacher and student do not share their tokens."""


class OpaqueTokenizer(PotstillError):
    """A tokenizer that does not say which bytes its tokens stand for."""


class RunFolderError(PotstillError):
    """An output folder that is not empty, is not a run, or cannot be written."""


class NonFiniteLoss(PotstillError):
    """Training met a NaN or an infinity."""


class SelfCheckFailed(PotstillError):
    """A loss that is not what it says, found out before the first step."""
