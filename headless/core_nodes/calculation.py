"""SimpleMath+ (ComfyUI_essentials), MathExpression|pysssss and SimpleCalculatorKJ: arithmetic, and nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Collection, Mapping

from ...node_tools import Inputs

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: math.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
FUNCTIONS = {"min": min, "max": max, "round": round, "abs": abs, "floor": math.floor, "ceil": math.ceil,
             "sqrt": math.sqrt, "int": int, "float": float, "pow": math.pow, "sin": math.sin, "cos": math.cos,
             "tan": math.tan, "log": math.log, "log10": math.log10, "exp": math.exp}  # fmt: skip
CONSTANTS = {"pi": math.pi, "euler": math.e}
VARIABLES = ("a", "b", "c", "d", "e", "f", "g", "h")
LONGEST = 500


class SimpleMath:
    """A formula of a, b and c."""

    FUNCTION = "execute"
    RETURN_TYPES = ("INT", "FLOAT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        number = ("INT,FLOAT", {"default": 0.0})
        return {
            "required": {"value": ("STRING", {"default": ""})},
            "optional": {"a": number, "b": number, "c": number},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, value: str) -> bool:
        """A formula that can be read."""
        _parsed(value, VARIABLES[:3])
        return True

    def execute(self, value: str, a: float = 0.0, b: float = 0.0, c: float = 0.0) -> tuple[int, float]:
        """The result as a whole number and as it is."""
        result = _result(value, {"a": a, "b": b, "c": c})
        return round(result), result


class MathExpression:
    """A formula of the numbers a, b and c (MathExpression|pysssss)."""

    FUNCTION = "evaluate"
    RETURN_TYPES = ("INT", "FLOAT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        number = ("INT,FLOAT", {"forceInput": True})
        return {
            "required": {"expression": ("STRING", {"default": "", "multiline": True})},
            "optional": {name: number for name in VARIABLES[:3]},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, expression: str) -> bool:
        """A formula that can be read."""
        _parsed(expression, VARIABLES[:3])
        return True

    def evaluate(self, expression: str, **numbers: float) -> tuple[int, float]:
        """The result without what follows the point, and as it is."""
        result = _result(expression, numbers)
        return int(result), result


class SimpleCalculatorKJ:
    """A formula of the numbers that are connected."""

    FUNCTION = "execute"
    RETURN_TYPES = ("FLOAT", "INT", "BOOLEAN")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"expression": ("STRING", {"default": "a + b", "multiline": True})},
            "optional": {name: ("INT,FLOAT,BOOLEAN", {"forceInput": True}) for name in VARIABLES},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, expression: str) -> bool:
        """A formula that can be read."""
        _parsed(expression, (*VARIABLES, *CONSTANTS))
        return True

    def execute(self, expression: str, **numbers: float) -> tuple[float, int, bool]:
        """The result as it is, without what follows the point, and whether it is not 0."""
        result = _result(expression, {**CONSTANTS, **numbers})
        return result, int(result), bool(result)


def _result(text: str, names: Mapping[str, float]) -> float:
    try:
        return float(_value(_parsed(text, names), names))
    except (ArithmeticError, TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in names.items() if name not in CONSTANTS)
        raise ValueError(f"The formula '{text}' has no value for {given or 'no numbers'} ({error}).") from error


def _parsed(text: str, names: Collection[str]) -> ast.expr:
    try:
        if len(text) > LONGEST:
            raise ValueError(f"more than {LONGEST} characters")
        tree = ast.parse(text.strip(), mode="eval").body
        _check(tree, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"'{text:.80}' is no formula ({error}); write numbers, {', '.join(names)}, + - * / // % ** and parentheses."
        ) from error
    return tree


def _check(node: ast.expr, names: Collection[str]) -> None:
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return
        case ast.Name(id=name) if name in names:
            return
        case ast.BoolOp(values=parts):
            pass
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            parts = [left, right]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            parts = [operand]
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
            parts = [left, right]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            parts = args
        case _:
            raise ValueError(f"{ast.unparse(node):.40} is not known here")
    for part in parts:
        _check(part, names)


def _value(node: ast.expr, names: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            return OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.BoolOp(op=op, values=parts):
            together = all if isinstance(op, ast.And) else any
            return together(_value(part, names) for part in parts)
        case ast.UnaryOp(op=op, operand=operand):
            return OPERATORS[type(op)](_value(operand, names))
        case ast.Call(func=ast.Name(id=name), args=args):
            return FUNCTIONS[name](*(_value(part, names) for part in args))
    raise AssertionError(node)


NODE_CLASS_MAPPINGS = {
    "SimpleMath+": SimpleMath,
    "MathExpression|pysssss": MathExpression,
    "SimpleCalculatorKJ": SimpleCalculatorKJ,
}
