"""Every error the engine raises on purpose.

    SiglanceError
    ├── BundleError            a bundle is broken, tampered with or incomplete
    │   └── UnsupportedBundle  a bundle is fine but needs a mechanism this engine does not have
    ├── InputError             what the caller passed in cannot be used (message names part, value and limit)
    │   ├── ImageError         an image cannot be read, or is over a limit
    │   ├── DocumentError      a PDF or one of its pages cannot be read, or is over a limit
    │   ├── VideoError         a video or one of its frames cannot be read, or is over a limit
    │   ├── AudioError         a sound cannot be read, or is over a limit
    │   ├── PromptError        the conversation cannot be turned into a prompt
    │   ├── SamplingError      a sampling value is out of range
    │   ├── GrammarError       a schema, regular expression or grammar cannot be used, or costs too much
    │   └── ContextFull        the prompt does not fit the context
    ├── DeviceError            the device that was asked for cannot be used
    ├── ModelOutputError       a graph failed, or produced something that cannot be decoded (non-finite logits)
    ├── Cancelled              the caller does not want the reply any more
    └── ExportError            a checkpoint cannot be turned into a bundle

The command line prints any of them as one line and exits with 1.
"""

__all__ = [
    "AudioError",
    "BundleError",
    "Cancelled",
    "ContextFull",
    "DeviceError",
    "DocumentError",
    "ExportError",
    "GrammarError",
    "ImageError",
    "InputError",
    "ModelOutputError",
    "PromptError",
    "SamplingError",
    "SiglanceError",
    "UnsupportedBundle",
    "VideoError",
]


class SiglanceError(Exception):
    """Base class of all errors raised on purpose."""


class BundleError(SiglanceError):
    """A bundle is broken, tampered with or incomplete."""


class UnsupportedBundle(BundleError):
    """A bundle needs a mechanism (`requires`) or a format this engine does not know."""


class InputError(SiglanceError, ValueError):
    """What the caller passed in cannot be used."""


class ImageError(InputError):
    """An image cannot be read, or is over a limit."""


class DocumentError(InputError):
    """A PDF or one of its pages cannot be read, or is over a limit."""


class VideoError(InputError):
    """A video or one of its frames cannot be read, or is over a limit."""


class AudioError(InputError):
    """A sound cannot be read, or is over a limit."""


class PromptError(InputError):
    """The conversation cannot be turned into a prompt."""


class SamplingError(InputError):
    """A sampling value is out of its range."""


class GrammarError(InputError):
    """A schema, regular expression or grammar cannot be used, or costs too much."""


class ContextFull(InputError):
    """The prompt does not fit the context of the model."""

    def __init__(self, prompt_tokens: int, context: int, at_least: bool = False):
        """`at_least` says that the tokens have not been counted, because no count of them could fit."""
        number = f"at least {prompt_tokens}" if at_least else prompt_tokens
        super().__init__(f"the prompt has {number} tokens, the context of this bundle holds {context}")
        self.prompt_tokens = prompt_tokens
        self.context = context
        self.at_least = at_least

    def __reduce__(self):
        """Errors cross process boundaries pickled, and the default would call the class with the message."""
        return type(self), (self.prompt_tokens, self.context, self.at_least)


class DeviceError(SiglanceError):
    """The device that was asked for cannot be used."""


class ModelOutputError(SiglanceError):
    """A graph failed, or produced something that cannot be decoded, such as non-finite logits."""


class Cancelled(SiglanceError):
    """The caller does not want the reply any more."""


class ExportError(SiglanceError):
    """A checkpoint cannot be turned into a bundle."""
