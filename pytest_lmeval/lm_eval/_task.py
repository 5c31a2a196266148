"""Ask a task of lm_eval as lm_eval asks it: its prompts, filters, scores and aggregations, on this engine.

one of lm_eval's tasks -> its documents -> its requests of each            here, when the task is asked
    -> log-likelihoods and answers                                         `measures._task_reading`, as of any other task
    -> its filters -> its `process_results` -> numbers by metric           `Requests.score`
    -> its aggregation over all documents                                  `Task.combine`
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pytest_lmeval.errors import CorpusError, TaskError, described
from pytest_lmeval.lm_eval._code import Code
from pytest_lmeval.lm_eval._drawing import answers_to, unlike_lm_eval
from pytest_lmeval.lm_eval._failures import LoggedErrors, why
from pytest_lmeval.lm_eval._mirror import mirrored
from pytest_lmeval.models._chat import Message, template_of
from pytest_lmeval.models._hub import HubCall
from pytest_lmeval.models._model import Model, special_pattern
from pytest_lmeval.tasks._questions import Generate, Requests
from pytest_lmeval.tasks._task import Setting, Task

PREFIX = "lm_eval:"
FEWSHOT_SEED = 1234  # of lm_eval's command line

Make = Callable[[], Any]
"""Makes a task of lm_eval, which reads its data."""


def lm_eval_task(name: str, make: Make, code: Callable[[], Code]) -> Task:
    """The task of this name; its data are read, and its code is run, when it is asked. `code` names what it would run."""
    return Task(name, (), _not_read, style="lm_eval", prepare=functools.partial(_prepared, name, make, code))


def _not_read(row: Any) -> None:
    raise TaskError("the rows of a task of lm_eval are read when it is asked.")


def _prepared(name: str, make: Make, code: Callable[[], Code], setting: Setting) -> Task:
    """The task with its rows, asked as `setting` says. Raises TaskError, with the row where one is to blame."""
    source = _made(name, make, code(), setting)
    shots = _set_shots(source, setting.shots)
    rows, questions = list[dict[str, Any]](), list[Requests]()
    documents = iter(source.doc_iterator(limit=setting.limit))
    while True:
        try:
            number, document = next(documents, (None, None))
            if number is None:
                break
            questions.append(_question(source, number, document, shots, setting))
            rows.append({"number": len(rows), "document": _hash_of(document)})
        except TaskError as error:
            raise TaskError(f"{name}, row {len(rows)}: {error}") from error
        except Exception as error:
            raise TaskError(f"{name}, row {len(rows)} cannot be asked: {described(error)}.") from error
    if not rows:
        raise TaskError(f"{name} has no documents to ask.")
    if setting.say is not None and any(one.generated for one in questions) and (unlike := unlike_lm_eval(setting.lm)):
        setting.say(
            f"{name}: lm_eval would generate answers with {unlike}, of the generation config of the model; here they are not"
        )
    version = getattr(source, "VERSION", None)
    return Task(
        name,
        rows,
        lambda row: questions[row["number"]],
        style="lm_eval",
        version=version if isinstance(version, int) else 1,
        special_tokens=special_pattern(setting.lm) is not None,  # as lm_eval reads them
        thinking=None,  # its own filters see whole answers, and count those that are cut off
        most_cut_off=1,
        shown=shots,
        combine=functools.partial(_combined, source),
    )


def _made(name: str, make: Make, code: Code, setting: Setting) -> Any:
    """lm_eval's task, its data read, after its code is named. Raises TaskError for one that cannot be had here."""
    if code.unsafe and not setting.trusted:
        raise _unsafe(name)
    if setting.say is not None and code.functions:
        setting.say(f"{name} runs code of its own: {', '.join(code.functions)}")
    said = LoggedErrors()
    try:
        with HubCall(), _quiet(), mirrored(setting.data_dir), said.heard():
            source = make()
    except CorpusError as error:
        raise TaskError(f"{name}: {error}") from error
    except Exception as error:
        raise TaskError(f"{name} cannot be loaded ({why(error, said.lines)}") from error
    if getattr(source, "MULTIMODAL", False):
        raise TaskError(f"{name} shows pictures or plays sounds, and {setting.lm.spec} reads text.")
    if getattr(source, "UNSAFE_CODE", False) and not setting.trusted:
        raise _unsafe(name)
    return source


def _unsafe(name: str) -> TaskError:
    return TaskError(
        f"{name} runs code that the model writes, on this machine, and lm_eval marks it as unsafe. Run it in a container that "
        f"you can lose, and allow it: --lmeval-trust-remote-code {name}."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While it lasts, `datasets` shows no progress bars: a task maps its rows several times."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _set_shots(source: Any, wanted: int | None) -> int:
    """Tell lm_eval's task how many examples to show, as its command line does, and how to draw them. Returns their number."""
    own = source.get_config("num_fewshot")
    shots = own or 0 if wanted is None or own == 0 else wanted
    source.set_config(key="num_fewshot", value=shots)
    source.set_fewshot_seed(seed=FEWSHOT_SEED)
    if shots and (pool := getattr(getattr(source, "sampler", None), "df", None)) is not None and len(pool) < shots:
        raise TaskError(
            f"{PREFIX}{source.task_name} is to be shown {shots} example(s), and its rows for that are {len(pool)}. Ask it with "
            "fewer shots, or add the split that it takes them from to the mirror."
        )
    return int(shots)


def _question(source: Any, number: int, document: Any, shots: int, setting: Setting) -> Requests:
    """The requests that lm_eval makes of a document, and how it scores their results."""
    chat = {
        "apply_chat_template": setting.in_turns,
        "chat_template": functools.partial(turns, setting.lm) if setting.in_turns else None,
    }
    try:
        context = source.fewshot_context(
            document,
            num_fewshot=shots,
            system_instruction=setting.system,
            fewshot_as_multiturn=setting.in_turns,
            gen_prefix=source.doc_to_prefix(document),
            **chat,
        )
    except (AssertionError, ValueError) as error:
        raise _too_few(source, document, shots) or error from error
    repeats = source.config.repeats or 1
    made = source.construct_requests(doc=document, ctx=context, metadata=(source.config.task, number, repeats), **chat)
    instances = made if isinstance(made, list) else [made]
    scored, rolling, generated = list[tuple[str, str]](), list[str](), list[Generate]()
    order = list[tuple[str, int, int]]()  # of each instance: its kind, the index of its first result, and how many it has
    for instance in instances:
        if instance.request_type == "loglikelihood":
            order.append(("scored", len(scored), 1))
            scored.append(tuple(instance.args))
        elif instance.request_type == "loglikelihood_rolling":
            order.append(("rolling", len(rolling), 1))
            rolling.append(instance.args[0])
        elif instance.request_type == "generate_until":
            answers = answers_to(setting.lm, *instance.args, times=instance.repeats)
            order.append(("generated", len(generated), len(answers)))
            generated += answers
        else:
            raise TaskError(f"lm_eval asks for {instance.request_type!r}, which is not known here.")

    def score(results: dict[str, Sequence[Any]]) -> dict[str, Any]:
        for instance, (kind, first, count) in zip(instances, order, strict=True):
            found = results[kind][first : first + count]
            instance.resps = list(found) if len(found) == instance.repeats else list(found) * instance.repeats
        return _scored(source, document, instances)

    return Requests(tuple(scored), tuple(rolling), tuple(generated), _target_of(source, document), score)


def _too_few(source: Any, document: Any, shots: int) -> TaskError | None:
    """Why a document cannot be shown its examples, if they are drawn from the rows that are asked: without itself and a spare
    row, which lm_eval draws, too few are left."""
    pool, config = getattr(getattr(source, "sampler", None), "df", None) or [], source.fewshot_cfg
    if not shots or config.split != source.config.test_split:
        return None
    most = max(0, min(len(pool) - 1, sum(row != document for row in pool)))
    if most >= shots:
        return None
    return TaskError(
        f"it is to be shown {shots} examples, drawn from the {len(pool)} rows of the split {config.split!r}, which are asked "
        f"themselves: {most} are left beside it. Ask with at most {most} shots, or with more rows."
    )


def turns(lm: Model, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """A conversation by the model's own template, as lm_eval has it rendered. Raises SpecError if the model has none."""
    return str(
        template_of(lm)(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
    )


def _scored(source: Any, document: Any, instances: Sequence[Any]) -> dict[str, Any]:
    """The numbers of a document: "acc", or "exact_match,strict-match" where the filter is called so."""
    for ensemble in source._filters:
        ensemble.apply(list(instances))
    found: dict[str, Any] = {}
    for filter_name in instances[0].filtered_resps:
        ordered = sorted(instances, key=operator.attrgetter("idx"))
        values = source.process_results(document, [instance.filtered_resps[filter_name] for instance in ordered])
        _check(source, values)
        found |= {metric if filter_name == "none" else f"{metric},{filter_name}": value for metric, value in values.items()}
    return found


def _check(source: Any, values: Any) -> None:
    """Raise TaskError if `process_results` returned no dict, or what is no number and is to be averaged."""
    from lm_eval.api.metrics import mean

    if not isinstance(values, Mapping):
        raise TaskError(
            f"process_results returned {str(values)[:80]!r}, of type {type(values).__name__}: it is a dict by metric"
        )
    averaged = (name for name in values if source.aggregation().get(name, mean) is mean)
    if wrong := next((name for name in averaged if isinstance(values[name], str | bytes) or values[name] is None), None):
        raise TaskError(f"process_results returned {values[wrong]!r} as {wrong}, which is averaged: it is a number")


def _combined(source: Any, name: str) -> tuple[Callable[[list[Any]], float], bool | None]:
    """What makes one number of those of all documents, and whether more is better."""
    from lm_eval.api.metrics import mean

    metric = name.partition(",")[0]
    return source.aggregation().get(metric, mean), source.higher_is_better().get(metric)


def _target_of(source: Any, document: Any) -> str | None:
    """The right answer as a text, if the document tells one."""
    with contextlib.suppress(Exception):  # shown only
        target = source.doc_to_target(document)
        if isinstance(target, int) and source.config.doc_to_choice is not None:
            target = source.doc_to_choice(document)[target]
        return str(target[0] if isinstance(target, list) and target else target).strip()
    return None


def _hash_of(document: Any) -> str:
    """lm_eval's own hash of a document, as its samples have it."""
    from lm_eval.utils import handle_non_serializable, hash_string

    return str(hash_string(json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)))
