"""Be a model of lm_eval, `lm-eval run --model pytest-lmeval`: its command line and files, this engine and its laws.

    lm-eval run --model pytest-lmeval --model_args pretrained=hf:FOLDER --tasks hellaswag,gsm8k

All requests of one document are one question; those of all tasks come in one call, and share what they begin with. The model is
probed first, and what is not proven is not used.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from pytest_lmeval._session import Session
from pytest_lmeval.engine import Policy, policy_for
from pytest_lmeval.engine._policy import limited
from pytest_lmeval.errors import ArgumentError, SpecError
from pytest_lmeval.lm_eval._drawing import answers_to
from pytest_lmeval.lm_eval._task import turns
from pytest_lmeval.measures._task import BATCH, measure_task
from pytest_lmeval.models._chat import template_of, with_template_kwargs
from pytest_lmeval.models._model import Model, special_pattern
from pytest_lmeval.tasks._questions import Requests
from pytest_lmeval.tasks._task import Task

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
KNOWN = "pretrained, dtype, enable_thinking, chat_template_args, profile and budget"
KINDS = ("scored", "rolling", "generated")


class LmevalModel(LM):  # type: ignore[misc]
    """A model as lm_eval asks it.

    pretrained  a spec: demo, zoo:NAME, hf:FOLDER, module.path:callable; a folder or hub id alone is one of hf:
    dtype       float32, bfloat16 or float16; default: that of the weights
    batch_size  rows of a batch; "auto" and lm_eval's default of 1 are the harness's own choice
    device      cpu, cuda, cuda:1, mps; one that is not there is a wish, since lm_eval asks for cuda:0 on every machine
    enable_thinking, chat_template_args  keywords of the chat template, as those of lm_eval's own `hf`
    profile, budget  how hard the laws are searched (`pytest_lmeval.laws.probe`)

    Raises SpecError for a model that cannot be found, and ArgumentError for an argument that is none of these.
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        dtype: str = "",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        profile: str = "",
        budget: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ArgumentError(f"--model_args has {', '.join(unknown)}: known are {KNOWN}.")
        if not pretrained:
            raise SpecError("which model? --model_args pretrained=SPEC, such as pretrained=demo or pretrained=hf:FOLDER.")
        if dtype and dtype not in {*PRECISIONS, "auto"}:
            raise ArgumentError(f"dtype={dtype}: it is one of {', '.join(PRECISIONS)}.")
        session = Session(profile=profile, budget=budget and int(budget), device=_there(device), say=_say)
        model = _loaded(session, pretrained, PRECISIONS.get(dtype, ""))
        certificate = session.verdict(model).certificate
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        model = with_template_kwargs(model, {**(chat_template_args or {}), **thinking})
        wanted = str(batch_size or "")
        rows = int(wanted) if wanted.isdigit() and int(wanted) > 1 else BATCH
        self._read_as(limited(model, certificate), policy_for(model, certificate, batch_size=rows))
        _say(f"pytest-lmeval reads {model.spec}: {certificate.summary}; {self.policy.sharing}")

    @classmethod
    def of(cls, model: Model, policy: Policy) -> LmevalModel:
        """A model that is loaded and probed."""
        made = cls.__new__(cls)
        LM.__init__(made)
        made._read_as(model, policy)
        return made

    def _read_as(self, model: Model, policy: Policy) -> None:
        self.model, self.policy, self.read = model, policy, {"tokens_read": 0, "tokens_alone": 0, "calls": 0}

    @property
    def device(self) -> Any:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        """For the name of a cached request."""
        return str(self.model.spec).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation by the model's own template."""
        return turns(self.model, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template by which it renders from here on, for lm_eval's results: the one of this name, if several have one; None
        if none is asked for."""
        if not chat_template:
            return None
        template_of(self.model)
        if isinstance(chat_template, str):
            given = getattr(self.model.tokenizer, "chat_template_kwargs", {})
            self.model = with_template_kwargs(self.model, {**given, "chat_template": chat_template})
        return str(getattr(self.model.tokenizer, "template", ""))

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into its results: the verdict, and what was read for all answers."""
        certificate = self.policy.certificate
        return {
            "model_spec": self.model.spec,
            "verdict": None if certificate is None else certificate.verdict,
            "laws": None if certificate is None else certificate.summary,
            **self.read,
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding would generate it) of each continuation."""
        return self._asked("scored", requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in nats: one reading with its state, in windows only where the context ends."""
        return self._asked("rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt."""
        return self._asked("generated", requests)

    def _asked(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        """The results of requests of one kind, in their order; the requests of a document are one question."""
        groups = [list(group) for _, group in itertools.groupby(requests, lambda one: (one.task_name, one.doc_id))]
        found = list[list[Any]]([[] for _ in groups])
        questions = [
            _question(self.model, kind, group, partial(_take, results)) for group, results in zip(groups, found, strict=True)
        ]
        rows = [{"task": group[0].task_name, "document": group[0].doc_id, "number": n} for n, group in enumerate(groups)]
        if not rows:
            return []
        special = special_pattern(self.model) is not None
        task = Task(
            "lm_eval",
            rows,
            lambda row: questions[row["number"]],
            style="lm_eval",
            special_tokens=special,
            thinking=None,
            most_cut_off=1,
            combine=_nothing,
        )
        details = measure_task(self.model, task, policy=self.policy).record.details
        for name in self.read:
            self.read[name] += details[name]
        results = [result for of_group in found for result in of_group]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(request.request_type, request.args, result)
        return results


def _question(
    lm: Model, kind: str, group: Sequence[Instance], score: Callable[[dict[str, Sequence[Any]]], dict[str, Any]]
) -> Requests:
    if kind == "generated":  # a repeated request is a further answer, drawn with random numbers of its own
        return Requests((), (), tuple(answers_to(lm, *one.args, times=1)[0] for one in group), None, score)
    if kind == "rolling":
        return Requests((), tuple(one.args[0] for one in group), (), None, score)
    return Requests(tuple((one.args[0], one.args[1]) for one in group), (), (), None, score)


def _take(found: list[Any], results: dict[str, Sequence[Any]]) -> dict[str, Any]:
    """Hand the results over to lm_eval, which scores them itself."""
    found[:] = [result for kind in KINDS for result in results[kind]]
    return {}


def _nothing(name: str) -> Any:
    raise AssertionError(f"lm_eval combines {name} itself")


def _loaded(session: Session, pretrained: str, precision: str) -> Any:
    """The model of a spec; what is no spec is a folder or an id of the hub."""
    name = f"{pretrained}@{precision}" if precision else pretrained
    try:
        return session.load(name)
    except SpecError as error:
        if ":" in pretrained:
            raise
        try:
            return session.load(f"hf:{name}")
        except SpecError:
            raise error from None


def _there(device: str | None) -> str:
    """The device that lm_eval asks for, if it is there."""
    import torch

    if not device or (device.startswith("cuda") and not torch.cuda.is_available()):
        return "auto"
    return device


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
