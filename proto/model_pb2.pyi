from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "trainable", "offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    trainable: bool
    offset: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., trainable: _Optional[bool] = ..., offset: _Optional[int] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("learner", "weight", "update_digest")
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    learner: str
    weight: float
    update_digest: bytes
    def __init__(self, learner: _Optional[str] = ..., weight: _Optional[float] = ..., update_digest: _Optional[bytes] = ...) -> None: ...

class Encryption(_message.Message):
    __slots__ = ("fingerprint", "limb_bits", "ring_dimension", "polynomials", "seeds", "exponents", "shares", "opens")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LIMB_BITS_FIELD_NUMBER: _ClassVar[int]
    RING_DIMENSION_FIELD_NUMBER: _ClassVar[int]
    POLYNOMIALS_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    EXPONENTS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    OPENS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    limb_bits: int
    ring_dimension: int
    polynomials: int
    seeds: int
    exponents: _containers.RepeatedScalarFieldContainer[int]
    shares: _containers.RepeatedCompositeFieldContainer[Share]
    opens: bytes
    def __init__(self, fingerprint: _Optional[bytes] = ..., limb_bits: _Optional[int] = ..., ring_dimension: _Optional[int] = ..., polynomials: _Optional[int] = ..., seeds: _Optional[int] = ..., exponents: _Optional[_Iterable[int]] = ..., shares: _Optional[_Iterable[_Union[Share, _Mapping]]] = ..., opens: _Optional[bytes] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("tensors", "payload_bytes", "encryption")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTION_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    payload_bytes: int
    encryption: Encryption
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., payload_bytes: _Optional[int] = ..., encryption: _Optional[_Union[Encryption, _Mapping]] = ...) -> None: ...
