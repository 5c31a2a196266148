"""Score answers by whether they follow the instructions of IFEval, checked by the library of its authors.

That is Google's instruction_following_eval, as lm-evaluation-harness ships it (Zhou et al. 2023, arXiv:2311.07911).
"""

from __future__ import annotations

import json

from pytest_lmeval.data._formats import Row
from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks._task import Scorer

NEED_DOWNLOADS = ("change_case:capital_word_frequency", "length_constraints:number_sentences")
"""The checks that cut a text into words or sentences by nltk's punkt_tab, which has to be downloaded."""


def ifeval() -> Scorer:
    """Whether the answer follows the instructions of its row, of IFEval's form: `prompt`, `instruction_id_list`, `kwargs`.

    Four metrics: `prompt_strict` (all are followed) and `instruction_strict` (the share of the row's that are), and both
    `loose`, where the answer may lack its first or last line, or its asterisks. (lm-evaluation-harness averages the second over
    all instructions of all rows.) Needs the extra `ifeval`, which looks for nltk's punkt_tab when it is imported, and tries to
    download it. Raises TaskError for an instruction that it does not know, and for one of `NEED_DOWNLOADS` without punkt_tab.
    """
    try:
        import langdetect
        from lm_eval.tasks.ifeval import utils
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise TaskError(f"scores.ifeval needs lm_eval's ifeval ({error}): pip install 'pytest-lmeval[ifeval]'") from None

    def score(row: Row, answer: str) -> dict[str, bool | float]:
        asked: list[str] = [*row["instruction_id_list"]]
        if unknown := [name for name in asked if name not in INSTRUCTION_DICT]:
            raise TaskError(f"{unknown[0]!r} is no instruction of IFEval")
        kwargs = json.loads(json.dumps(row["kwargs"]))  # plain: the library writes them into texts
        told = utils.InputExample(key=0, instruction_id_list=asked, prompt=row["prompt"], kwargs=kwargs)
        langdetect.DetectorFactory.seed = 0  # its guesses are random otherwise
        try:
            strict, loose = (
                check(told, answer).follow_instruction_list
                for check in (utils.test_instruction_following_strict, utils.test_instruction_following_loose)
            )
        except LookupError as error:
            if not (needs := [name for name in asked if name in NEED_DOWNLOADS]):
                raise
            what = f"{' and '.join(needs)} cannot be checked without nltk's punkt_tab"
            raise TaskError(f"{what}, which is not here: python -m nltk.downloader punkt_tab") from error
        return {
            "prompt_strict": all(strict),
            "prompt_loose": all(loose),
            "instruction_strict": sum(strict) / len(strict),
            "instruction_loose": sum(loose) / len(loose),
        }

    return score
