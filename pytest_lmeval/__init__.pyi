"""List the public names, each with the module that it is imported from when it is first used (see `__init__.py`)."""

from .data import corpus as corpus
from .data._corpus import (
    Corpus as Corpus,
    Document as Document,
)
from .data._rows import Rows as Rows
from .engine import (
    Engine as Engine,
    Policy as Policy,
    policy_for as policy_for,
)
from .engine._rows import score_rows as score_rows
from .errors import (
    ArgumentError as ArgumentError,
    BaselineError as BaselineError,
    ChildFailed as ChildFailed,
    CorpusError as CorpusError,
    DocumentError as DocumentError,
    HubError as HubError,
    LawBroken as LawBroken,
    LmevalError as LmevalError,
    MergeError as MergeError,
    ModelError as ModelError,
    NoIntervalError as NoIntervalError,
    NotFiniteError as NotFiniteError,
    NotMeasuredError as NotMeasuredError,
    NotPossible as NotPossible,
    OutOfMemory as OutOfMemory,
    ProfilingError as ProfilingError,
    ProtocolError as ProtocolError,
    RankError as RankError,
    Refused as Refused,
    RegistryError as RegistryError,
    ServerError as ServerError,
    SideError as SideError,
    SpecError as SpecError,
    StreamError as StreamError,
    TaskError as TaskError,
    TrainingError as TrainingError,
    UnknownVerb as UnknownVerb,
    UnreadableError as UnreadableError,
    UsageError as UsageError,
    WithheldError as WithheldError,
)
from .laws import replay as replay
from .measures._agreement import agreement as agreement
from .measures._efficiency import efficiency as efficiency
from .measures._equivalence import equivalence as equivalence
from .measures._hidden_states import (
    hidden_states as hidden_states,
    iter_hidden_states as iter_hidden_states,
)
from .measures._latency import latency as latency
from .measures._latency_grid import latency_grid as latency_grid
from .measures._load_test import load_test as load_test
from .measures._memory import memory as memory
from .measures._perplexity import perplexity as perplexity
from .measures._record import record as record
from .measures._snapshot import snapshot as snapshot
from .measures._streaming import streaming as streaming
from .measures._suite import suite as suite
from .measures._task import task as task
from .measures._throughput import throughput as throughput
from .models._model import (
    Codebooks as Codebooks,
    LanguageModel as LanguageModel,
    Model as Model,
    Tokenizer as Tokenizer,
    fork as fork,
    state_bytes as state_bytes,
)
from .models._sources import (
    Loaded as Loaded,
    as_model as as_model,
    load as load,
)
from .records._document import Section as Section
from .records._example import Example as Example
from .records._measured import (
    Record as Record,
    Series as Series,
)
from .records._metric import Metric as Metric
from .records._value import Value as Value
from .scoring._hidden_files import load_hidden_states as load_hidden_states
from .scoring._hidden_states import HiddenStates as HiddenStates
from .tasks import (
    Choices as Choices,
    Generate as Generate,
    Suite as Suite,
    Task as Task,
)
from .training import (
    Protocol as Protocol,
    load_weights as load_weights,
)
from .training._finetune_verb import finetune as finetune
from .training._verb import train as train
