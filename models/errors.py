"""Every error a user can cause or meet, each with what is wrong and the remedy.

Raise the most specific class: `raise BadImage(f"{path} does not decode as an image.", "Remove the file or save it again as PNG.")`.
The command line prints the message alone (no traceback) and exits 1; Dagster shows it as the step's failure.
"""


class OneRewardError(Exception):
    """Base class. `what` names the offending thing, `remedy` says what to do about it."""

    def __init__(self, what: str, remedy: str):
        self.what = what
        self.remedy = remedy
        super().__init__(what, remedy)  # what unpickling calls it with again, in another process

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}"


class ConfigError(OneRewardError):
    """A configuration value is out of range or two values contradict each other."""


class UnknownTask(OneRewardError):
    """A task name that the taxonomy does not list."""


class UnknownDimension(OneRewardError):
    """A dimension name that the taxonomy does not list."""


class BadImage(OneRewardError):
    """An image that cannot be read, or whose size or mode cannot be used."""


class BadMask(OneRewardError):
    """A mask of another size than its image, empty, or full."""


class BadManifest(OneRewardError):
    """A manifest or label file with a line that cannot be used."""


class BadLabel(OneRewardError):
    """A label that names an unknown condition, candidate or dimension, or contradicts itself."""


class NotEnoughData(OneRewardError):
    """A folder, split or cell with too few rows for the stage to work."""


class MissingWeights(OneRewardError):
    """A weights folder or file that is not there."""


class BrokenWeights(OneRewardError):
    """A weights file that is cut, altered, or of another architecture."""


class DiskFull(OneRewardError):
    """No space left where an artifact is being written."""


class StoreError(OneRewardError):
    """The artifact store cannot be read or written."""


class UnknownVersion(StoreError):
    """A version, digest or stage that the store does not hold."""


class DigestMismatch(StoreError):
    """Stored bytes do not hash to the digest they are stored under."""


class SignatureRefused(StoreError):
    """Evidence, a release or an audit entry that is not signed by a trusted key, or a key that cannot be used."""


class AuditBroken(StoreError):
    """The audit log was edited, shortened or reordered; the message names the first entry that does not hold."""


class InputsChanged(OneRewardError):
    """What a stage is made from changed while it was being made."""


class GateRefused(OneRewardError):
    """Promotion was refused: evidence is missing, for another digest, or says no."""


class ExportError(OneRewardError):
    """An ONNX or TensorRT export failed or does not agree with the network it was made from."""


class RunUnderWay(OneRewardError):
    """Another run of the same home has not ended."""


class ServerUnreachable(OneRewardError):
    """A database, store or hub server does not answer."""
