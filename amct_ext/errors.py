"""The exception types of our own.

Each derives from the type AMCT raises in the same situation, so the `except` clauses of an existing job keep working;
a message says what was wrong, where, and what would be right. Failures that Python names well (a missing file, a wrong
argument type) stay FileNotFoundError, TypeError, ... .
"""

from __future__ import annotations

import pickle

from google.protobuf import text_format


class AmctError(Exception):
    """Base of everything below."""


class ConfigError(AmctError, ValueError):
    """The configuration asks for something impossible or contradictory (AMCT: ValueError)."""


class ConfigParseError(ConfigError, text_format.ParseError):  # type: ignore[misc]  # protobuf has no types
    """The configuration is not valid protobuf text (AMCT: protobuf's text_format.ParseError)."""

    def __init__(self, message: str, line: int | None = None, column: int | None = None) -> None:
        # ParseError's own constructor would put "line:column : " in front; the message already says where.
        super().__init__(message)
        self._line = line
        self._column = column


class RecordError(AmctError, RuntimeError):
    """A record file cannot be read, is not consistent, or belongs to another model (AMCT: RuntimeError)."""


class RecordRangeError(RecordError, ValueError):
    """A factor of the record lies outside its range (AMCT: ValueError)."""


class ModelError(AmctError, RuntimeError):
    """The model cannot be traced or compressed, or already is compressed (AMCT: RuntimeError)."""


class InputDataError(ModelError):
    """input_data holds no arguments for the model, or the model rejects it (AMCT: RuntimeError)."""


class InvalidDataError(AmctError, RuntimeError, ValueError):
    """Data that cannot be quantised: NaN or Inf in activations or weights, a scale that is not finite and positive."""


class StaleStateError(AmctError, RuntimeError):
    """State that must agree does not: a result was asked for before it exists or after its inputs changed."""


class CheckpointError(AmctError, RuntimeError):
    """A checkpoint does not fit the model (AMCT: torch's RuntimeError of load_state_dict)."""


class CheckpointKeyError(CheckpointError, KeyError):
    """The checkpoint has no (or an empty) entry of the given state_dict_name (AMCT: KeyError)."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class UnsafeCheckpointError(CheckpointError, pickle.UnpicklingError):
    """The checkpoint holds objects that only running code of the file could build (torch: UnpicklingError)."""


class ExportError(AmctError, RuntimeError):
    """The model cannot be written as ONNX (AMCT: RuntimeError)."""
