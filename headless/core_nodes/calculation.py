"""SimpleMath+ (ComfyUI_essentials): arithmetic of numbers, and of nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Mapping

Inputs = dict[str, dict[str, tuple[object, ...]]]

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: math.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
FUNCTIONS = {"min": min, "max": max, "round": round, "abs": abs, "floor": math.floor, "ceil": math.ceil,
             "sqrt": math.sqrt, "int": int, "float": float}  # fmt: skip
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
        _parsed(value)
        return True

    def execute(self, value: str, a: float = 0.0, b: float = 0.0, c: float = 0.0) -> tuple[int, float]:
        """The result as a whole number and as it is."""
        try:
            result = float(_value(_parsed(value), {"a": a, "b": b, "c": c}))
            return round(result), result
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"The formula '{value}' has no value for a={a}, b={b}, c={c} ({error}).") from error


def _parsed(text: str) -> ast.expr:
    try:
        if len(text) > LONGEST:
            raise ValueError(f"more than {LONGEST} characters")
        tree = ast.parse(text.strip(), mode="eval").body
        _check(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"'{text:.80}' is no formula ({error}); write numbers, a, b, c, + - * / // % ** and parentheses."
        ) from error
    return tree


def _check(node: ast.expr) -> None:
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return
        case ast.Name(id="a" | "b" | "c"):
            return
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
        _check(part)


def _value(node: ast.expr, names: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            return OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op=op, operand=operand):
            return OPERATORS[type(op)](_value(operand, names))
        case ast.Call(func=ast.Name(id=name), args=args):
            return FUNCTIONS[name](*(_value(part, names) for part in args))
    raise AssertionError(node)


NODE_CLASS_MAPPINGS = {"SimpleMath+": SimpleMath}
