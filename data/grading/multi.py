"""`multi`: several graders and a formula over their rewards, as in OpenAI's grader schema."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from data.grading.types import AbstainError, BaseGrader, Graded, Grader, GraderConfig, GradeResult, Item

OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
}


class MultiConfig(GraderConfig):
    """`calculate_output` is a formula over the names of `graders`, for example `0.7 * a + 0.3 * b`."""

    type: Literal["multi"]
    graders: dict[str, dict[str, Any]] = Field(min_length=1, max_length=32)
    calculate_output: str = Field(max_length=1_000)

    @field_validator("graders")
    @classmethod
    def _names(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in value:
            if not name.isidentifier() or name in FUNCTIONS:
                raise ValueError(f"the name {name!r} cannot stand in a formula")
        return value

    @model_validator(mode="after")
    def _formula(self) -> "MultiConfig":
        check_formula(self.calculate_output, set(self.graders))
        return self


class Multi(BaseGrader[MultiConfig]):
    """Reward is the formula's value, cut to [0, 1]; an abstention of any grader in it is one of the whole."""

    modules: ClassVar[tuple[str, ...]] = ("multi",)

    def __init__(self, config: MultiConfig, graders: Mapping[str, Grader]) -> None:
        self.libraries = tuple(grader.version for _, grader in sorted(graders.items()))
        super().__init__(config)
        self.graders = graders

    def _grade(self, item: Item, sample: dict[str, Any]) -> Graded:
        return self._formula({name: grader.grade(item, sample) for name, grader in self.graders.items()})

    def combine(self, results: Mapping[str, GradeResult]) -> GradeResult:
        """The verdict from those of the graders in it, by their names."""
        return self._guarded(lambda: self._formula(results))

    def _formula(self, results: Mapping[str, GradeResult]) -> Graded:
        rewards: dict[str, float] = {}
        for name, result in results.items():
            if result.reward is None:
                raise AbstainError(f"{name} abstains: {result.reason}", result.error)
            rewards[name] = result.reward
        try:
            value = float(evaluate_formula(self.config.calculate_output, rewards))
        except (ArithmeticError, ValueError) as error:
            raise AbstainError(f"the formula has no value here ({error})", "formula_parse_error") from None
        if not math.isfinite(value):
            raise AbstainError("the formula's value is not finite")
        return value, rewards, f"{self.config.calculate_output} = {value:.3f}"


def check_formula(formula: str, names: set[str]) -> None:
    """Refuse anything but arithmetic over `names`.

    Raises:
        ValueError: with what is wrong.
    """
    try:
        tree = ast.parse(formula, mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("is not a formula") from None
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node not in called and node.id not in names:
            raise ValueError(f"names the unknown grader {node.id!r}; known: {', '.join(sorted(names))}")
        if not isinstance(node, (ast.Expression, ast.Load, ast.Name)) and not _allowed(node):
            raise ValueError(f"may hold numbers, names, + - * / and {', '.join(FUNCTIONS)} only")


def evaluate_formula(formula: str, values: Mapping[str, float]) -> float:
    """The value of a checked formula."""
    return _value(ast.parse(formula, mode="eval").body, values)


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
    return isinstance(node, (ast.BinOp, ast.UnaryOp)) or type(node) in OPERATORS


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=number):
            return float(number)  # type: ignore[arg-type]
        case ast.Name(id=name):
            return values[name]
        case ast.UnaryOp(op=op, operand=operand):
            return OPERATORS[type(op)](_value(operand, values))
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_value(left, values), _value(right, values))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            try:
                return float(FUNCTIONS[name](*(_value(argument, values) for argument in arguments)))
            except TypeError as error:
                raise ValueError(str(error)) from None
    raise AssertionError(ast.dump(node))
