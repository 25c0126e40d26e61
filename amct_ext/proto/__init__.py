"""Message classes of the two text files (proto/retrain_config.proto, proto/record.proto).

The classes are built at run time from carried descriptors instead of from generated *_pb2 modules. Generated ones are
tied to protobuf versions near their compiler's (newer ones check it on import); descriptors are plain data that every
runtime reads, and a build needs no compiler. The pool is our own, so nothing of ours enters the process-wide pool:
AMCT's own modules, or a second copy of this package, can be imported next to it.
"""

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from amct_ext.proto.descriptors import DESCRIPTORS


@cache
def _pool() -> Any:
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS)
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


@cache
def message_class(name: str) -> Any:
    """The class of the message with this full name, e.g. 'amct_ext.config.RetrainConfig'."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))
