"""Every error a user can meet, each with what went wrong, why, and one hint.

EdgeError                       exit code 1
├── UsageError                  exit code 2: the request itself cannot be met
│   ├── BoundaryError           boundaries out of range, unsorted or repeated
│   └── PromptError             empty prompt, or longer than the context
├── LibraryError                the patched llama.cpp is missing, foreign or of another ABI
├── ModelError                  the model file cannot be used
│   ├── ModelNotFoundError      no such file or name
│   ├── ModelUnreadableError    not a GGUF, cut short, or damaged
│   └── UnsupportedModelError   an architecture or kind of file that cannot be sliced
├── PackError                   a pack is missing, damaged, or of another model
├── MemoryLimitError            the model and its context need more memory than there is
└── DecodeError                 llama.cpp refused or failed a batch
    └── ContextFullError        no room left in the KV cache
"""

from __future__ import annotations


class EdgeError(Exception):
    """An expected failure: `message` says what and why, `hint` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(EdgeError):
    exit_code = 2


class BoundaryError(UsageError):
    pass


class PromptError(UsageError):
    pass


class LibraryError(EdgeError):
    pass


class ModelError(EdgeError):
    pass


class ModelNotFoundError(ModelError):
    pass


class ModelUnreadableError(ModelError):
    pass


class UnsupportedModelError(ModelError):
    pass


class PackError(EdgeError):
    pass


class MemoryLimitError(EdgeError):
    pass


class DecodeError(EdgeError):
    pass


class ContextFullError(DecodeError):
    pass
