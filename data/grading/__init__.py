"""Graders: functions that turn an answer into a reward in [0, 1], or abstain.

`make_grader(config)` builds one from a configuration in OpenAI's grader schema (`string_check`,
`text_similarity`, `label_model`, `score_model`, `python`, `multi`) or of a kind of our own (`rubric`, `dataset_label`,
`reward_model`, `pair_model`). The same item, answer and version give the same reward. No torch is imported; reward
models and judges are inference behind an engine.
"""

from data.grading.make import AtHand, load_grader, make_grader
from data.grading.types import Grader, GradeResult

__all__ = ["AtHand", "GradeResult", "Grader", "load_grader", "make_grader"]
