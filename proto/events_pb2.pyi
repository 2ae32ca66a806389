from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_KIND_UNSPECIFIED: _ClassVar[TaskKind]
    INITIALISE: _ClassVar[TaskKind]
    TRAIN: _ClassVar[TaskKind]
    EVALUATE: _ClassVar[TaskKind]
    OPEN: _ClassVar[TaskKind]
TASK_KIND_UNSPECIFIED: TaskKind
INITIALISE: TaskKind
TRAIN: TaskKind
EVALUATE: TaskKind
OPEN: TaskKind

class Envelope(_message.Message):
    __slots__ = ("version", "event_id", "topic", "publisher", "epoch", "sequence", "created_unix_ns", "type", "correlation_id", "payload")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    version: int
    event_id: bytes
    topic: str
    publisher: str
    epoch: int
    sequence: int
    created_unix_ns: int
    type: str
    correlation_id: str
    payload: bytes
    def __init__(self, version: _Optional[int] = ..., event_id: _Optional[bytes] = ..., topic: _Optional[str] = ..., publisher: _Optional[str] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., created_unix_ns: _Optional[int] = ..., type: _Optional[str] = ..., correlation_id: _Optional[str] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "software", "epoch")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    software: str
    epoch: int
    def __init__(self, protocol: _Optional[int] = ..., software: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "software", "incarnation", "head", "publisher_sequence", "principal")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    software: str
    incarnation: int
    head: int
    publisher_sequence: int
    principal: str
    def __init__(self, protocol: _Optional[int] = ..., software: _Optional[str] = ..., incarnation: _Optional[int] = ..., head: _Optional[int] = ..., publisher_sequence: _Optional[int] = ..., principal: _Optional[str] = ...) -> None: ...

class LearnerJoined(_message.Message):
    __slots__ = ("learner", "software", "privacy_modes", "examples")
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_MODES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    learner: str
    software: str
    privacy_modes: _containers.RepeatedScalarFieldContainer[str]
    examples: int
    def __init__(self, learner: _Optional[str] = ..., software: _Optional[str] = ..., privacy_modes: _Optional[_Iterable[str]] = ..., examples: _Optional[int] = ...) -> None: ...

class LearnerLeft(_message.Message):
    __slots__ = ("learner", "reason")
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    learner: str
    reason: str
    def __init__(self, learner: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class PeerAdmitted(_message.Message):
    __slots__ = ("principal", "public")
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_FIELD_NUMBER: _ClassVar[int]
    principal: str
    public: str
    def __init__(self, principal: _Optional[str] = ..., public: _Optional[str] = ...) -> None: ...

class PeerExpelled(_message.Message):
    __slots__ = ("principal", "public")
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_FIELD_NUMBER: _ClassVar[int]
    principal: str
    public: str
    def __init__(self, principal: _Optional[str] = ..., public: _Optional[str] = ...) -> None: ...

class MemberAdmitted(_message.Message):
    __slots__ = ("learner",)
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    learner: str
    def __init__(self, learner: _Optional[str] = ...) -> None: ...

class CeremonyStep(_message.Message):
    __slots__ = ("ceremony", "learner", "step", "body", "signature")
    CEREMONY_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ceremony: bytes
    learner: str
    step: int
    body: bytes
    signature: bytes
    def __init__(self, ceremony: _Optional[bytes] = ..., learner: _Optional[str] = ..., step: _Optional[int] = ..., body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Hyperparameters(_message.Message):
    __slots__ = ("epochs", "batch_size", "learning_rate")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    epochs: int
    batch_size: int
    learning_rate: float
    def __init__(self, epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class RunStarted(_message.Message):
    __slots__ = ("run_id", "rounds", "learners", "quorum", "lease_s", "seed", "privacy", "hyperparameters", "waits_for_quorum", "max_examples", "continues")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    LEARNERS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_QUORUM_FIELD_NUMBER: _ClassVar[int]
    MAX_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    CONTINUES_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    rounds: int
    learners: _containers.RepeatedScalarFieldContainer[str]
    quorum: int
    lease_s: float
    seed: int
    privacy: str
    hyperparameters: Hyperparameters
    waits_for_quorum: bool
    max_examples: int
    continues: str
    def __init__(self, run_id: _Optional[str] = ..., rounds: _Optional[int] = ..., learners: _Optional[_Iterable[str]] = ..., quorum: _Optional[int] = ..., lease_s: _Optional[float] = ..., seed: _Optional[int] = ..., privacy: _Optional[str] = ..., hyperparameters: _Optional[_Union[Hyperparameters, _Mapping]] = ..., waits_for_quorum: _Optional[bool] = ..., max_examples: _Optional[int] = ..., continues: _Optional[str] = ...) -> None: ...

class RunStopped(_message.Message):
    __slots__ = ("run_id", "reason")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    reason: str
    def __init__(self, run_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RunFinished(_message.Message):
    __slots__ = ("run_id", "outcome", "reason", "model_digest", "rounds", "record")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[RunFinished.Outcome]
        COMPLETED: _ClassVar[RunFinished.Outcome]
        FAILED: _ClassVar[RunFinished.Outcome]
        STOPPED: _ClassVar[RunFinished.Outcome]
    OUTCOME_UNSPECIFIED: RunFinished.Outcome
    COMPLETED: RunFinished.Outcome
    FAILED: RunFinished.Outcome
    STOPPED: RunFinished.Outcome
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    outcome: RunFinished.Outcome
    reason: str
    model_digest: bytes
    rounds: int
    record: bytes
    def __init__(self, run_id: _Optional[str] = ..., outcome: _Optional[_Union[RunFinished.Outcome, str]] = ..., reason: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., rounds: _Optional[int] = ..., record: _Optional[bytes] = ...) -> None: ...

class Invitation(_message.Message):
    __slots__ = ("learner", "task_id")
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    learner: str
    task_id: str
    def __init__(self, learner: _Optional[str] = ..., task_id: _Optional[str] = ...) -> None: ...

class RoundOpened(_message.Message):
    __slots__ = ("run_id", "round", "model_digest", "invited", "attempt", "reference_weight", "exponents", "keeps_updates")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    INVITED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    EXPONENTS_FIELD_NUMBER: _ClassVar[int]
    KEEPS_UPDATES_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    model_digest: bytes
    invited: _containers.RepeatedCompositeFieldContainer[Invitation]
    attempt: int
    reference_weight: float
    exponents: _containers.RepeatedScalarFieldContainer[int]
    keeps_updates: bool
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., model_digest: _Optional[bytes] = ..., invited: _Optional[_Iterable[_Union[Invitation, _Mapping]]] = ..., attempt: _Optional[int] = ..., reference_weight: _Optional[float] = ..., exponents: _Optional[_Iterable[int]] = ..., keeps_updates: _Optional[bool] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("learner", "task_id", "weight", "update_digest")
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    learner: str
    task_id: str
    weight: float
    update_digest: bytes
    def __init__(self, learner: _Optional[str] = ..., task_id: _Optional[str] = ..., weight: _Optional[float] = ..., update_digest: _Optional[bytes] = ...) -> None: ...

class Absence(_message.Message):
    __slots__ = ("learner", "reason", "kind")
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    learner: str
    reason: str
    kind: str
    def __init__(self, learner: _Optional[str] = ..., reason: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class RoundClosed(_message.Message):
    __slots__ = ("run_id", "round", "model_digest", "counted", "missing", "reference_weight", "previous_record")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_RECORD_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    model_digest: bytes
    counted: _containers.RepeatedCompositeFieldContainer[Contribution]
    missing: _containers.RepeatedCompositeFieldContainer[Absence]
    reference_weight: float
    previous_record: bytes
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., model_digest: _Optional[bytes] = ..., counted: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., missing: _Optional[_Iterable[_Union[Absence, _Mapping]]] = ..., reference_weight: _Optional[float] = ..., previous_record: _Optional[bytes] = ...) -> None: ...

class ModelOpened(_message.Message):
    __slots__ = ("run_id", "round", "model_digest", "partials_digest")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARTIALS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    model_digest: bytes
    partials_digest: bytes
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., model_digest: _Optional[bytes] = ..., partials_digest: _Optional[bytes] = ...) -> None: ...

class TaskAssigned(_message.Message):
    __slots__ = ("task_id", "run_id", "round", "kind", "learner", "model_digest", "seed", "lease_s", "hyperparameters", "keep_model", "attempt", "reference_weight", "exponents", "privacy", "initial_seed", "partials_digest", "continues")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    KEEP_MODEL_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    EXPONENTS_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    INITIAL_SEED_FIELD_NUMBER: _ClassVar[int]
    PARTIALS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONTINUES_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    run_id: str
    round: int
    kind: TaskKind
    learner: str
    model_digest: bytes
    seed: int
    lease_s: float
    hyperparameters: Hyperparameters
    keep_model: bool
    attempt: int
    reference_weight: float
    exponents: _containers.RepeatedScalarFieldContainer[int]
    privacy: str
    initial_seed: int
    partials_digest: bytes
    continues: str
    def __init__(self, task_id: _Optional[str] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., kind: _Optional[_Union[TaskKind, str]] = ..., learner: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., seed: _Optional[int] = ..., lease_s: _Optional[float] = ..., hyperparameters: _Optional[_Union[Hyperparameters, _Mapping]] = ..., keep_model: _Optional[bool] = ..., attempt: _Optional[int] = ..., reference_weight: _Optional[float] = ..., exponents: _Optional[_Iterable[int]] = ..., privacy: _Optional[str] = ..., initial_seed: _Optional[int] = ..., partials_digest: _Optional[bytes] = ..., continues: _Optional[str] = ...) -> None: ...

class TaskCancelled(_message.Message):
    __slots__ = ("task_id", "reason")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    reason: str
    def __init__(self, task_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class TaskCompleted(_message.Message):
    __slots__ = ("task_id", "learner", "update_digest", "examples", "batches", "metrics", "training_s", "exponents")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    UPDATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_S_FIELD_NUMBER: _ClassVar[int]
    EXPONENTS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    learner: str
    update_digest: bytes
    examples: int
    batches: int
    metrics: _containers.ScalarMap[str, float]
    training_s: float
    exponents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, task_id: _Optional[str] = ..., learner: _Optional[str] = ..., update_digest: _Optional[bytes] = ..., examples: _Optional[int] = ..., batches: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., training_s: _Optional[float] = ..., exponents: _Optional[_Iterable[int]] = ...) -> None: ...

class ScaleExceeded(_message.Message):
    __slots__ = ("task_id", "learner", "tensor", "exponents")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    EXPONENTS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    learner: str
    tensor: str
    exponents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, task_id: _Optional[str] = ..., learner: _Optional[str] = ..., tensor: _Optional[str] = ..., exponents: _Optional[_Iterable[int]] = ...) -> None: ...

class TaskFailed(_message.Message):
    __slots__ = ("task_id", "learner", "reason")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    learner: str
    reason: str
    def __init__(self, task_id: _Optional[str] = ..., learner: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class UpdateStored(_message.Message):
    __slots__ = ("task_id", "learner", "digest", "update_bytes")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    UPDATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    learner: str
    digest: bytes
    update_bytes: int
    def __init__(self, task_id: _Optional[str] = ..., learner: _Optional[str] = ..., digest: _Optional[bytes] = ..., update_bytes: _Optional[int] = ...) -> None: ...

class UpdateUnusable(_message.Message):
    __slots__ = ("task_id", "learner", "reason")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    learner: str
    reason: str
    def __init__(self, task_id: _Optional[str] = ..., learner: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class LeaseEnded(_message.Message):
    __slots__ = ("task_id", "learner", "silent_s")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    learner: str
    silent_s: float
    def __init__(self, task_id: _Optional[str] = ..., learner: _Optional[str] = ..., silent_s: _Optional[float] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("learner", "state")
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    learner: str
    state: str
    def __init__(self, learner: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class Awaited(_message.Message):
    __slots__ = ("learner", "task_id", "since_unix_ns", "lease_left_s")
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    learner: str
    task_id: str
    since_unix_ns: int
    lease_left_s: float
    def __init__(self, learner: _Optional[str] = ..., task_id: _Optional[str] = ..., since_unix_ns: _Optional[int] = ..., lease_left_s: _Optional[float] = ...) -> None: ...

class ControllerStatus(_message.Message):
    __slots__ = ("run_id", "phase", "round", "rounds", "quorum", "counted", "invited", "waits_for", "awaited", "awaited_total")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    INVITED_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    AWAITED_FIELD_NUMBER: _ClassVar[int]
    AWAITED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    phase: str
    round: int
    rounds: int
    quorum: int
    counted: int
    invited: int
    waits_for: str
    awaited: _containers.RepeatedCompositeFieldContainer[Awaited]
    awaited_total: int
    def __init__(self, run_id: _Optional[str] = ..., phase: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., quorum: _Optional[int] = ..., counted: _Optional[int] = ..., invited: _Optional[int] = ..., waits_for: _Optional[str] = ..., awaited: _Optional[_Iterable[_Union[Awaited, _Mapping]]] = ..., awaited_total: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("task_id", "learner", "state", "fraction", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    learner: str
    state: str
    fraction: float
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, task_id: _Optional[str] = ..., learner: _Optional[str] = ..., state: _Optional[str] = ..., fraction: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...
