"""What methods that forward does not run do with a layer, as far as their code names it.

A model has other entrances than forward (``features``, a property), which no trace shows. Their
bytecode loads what they use as an attribute: ``self.body(x)`` calls all of the body,
``self.body[0](x)`` opens it, ``self.conv.eval()`` does neither. A layer that one of them may use
without its batch norm, or the other way round, is not to be folded. What finds modules otherwise,
by iterating or by a name made at run time, is listed as unseen.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from itertools import chain
from types import CodeType
from typing import NamedTuple

from torch import nn

from bnlib.fold.pair import NotExact, held

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What finds modules in ways that the code does not name.
_BLIND = {"getattr", "get_submodule", "_modules", "modules", "named_modules"}
_BLIND |= {"children", "named_children"}
# What a method may do with a layer that leaves its evaluation as it is.
_HARMLESS = {"eval", "requires_grad_", "parameters", "named_parameters", "zero_grad"}


class _Mention(NamedTuple):
    """A place in a method's code that loads an attribute, or self alone (the name "")."""

    name: str
    attribute: str | None  # what is loaded from it next
    called: bool


class _Method(NamedTuple):
    name: str
    mentions: tuple[_Mention, ...]
    builds: bool  # as part of the construction, which is over
    blind: bool


class HiddenMethods:
    """The methods of a model's modules but for those that ran in a trace: (module's name, code)."""

    def __init__(self, model: nn.Module, ran: set[tuple[str, CodeType]]) -> None:
        self._paths: dict[nn.Module, list[tuple[list[str], list[nn.Module]]]] = {}
        self._methods: dict[nn.Module, list[_Method]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            keys = name.split(".") if name else []
            parts = [model.get_submodule(".".join(keys[:i])) for i in range(len(keys) + 1)]
            self._paths.setdefault(module, []).append((keys, parts))
            for key, value in held(module):  # in a plain list, say
                value = getattr(value, "__self__", value)  # of a bound method
                if isinstance(value, nn.Module):
                    self._paths.setdefault(value, []).append(([*keys, key], [*parts, value]))
        for name, module in model.named_modules():
            self._methods[module] = [
                _method(module, method, code)
                for code, method in methods(module).items()
                if (name, code) not in ran
            ]

    def check(self, module: nn.Module, partner: nn.Module) -> None:
        """Raise if a method may use the module without its partner."""
        for keys, parts in self._paths[module]:
            for depth, owner in enumerate(parts[:-1]):
                for method in self._methods[owner]:
                    if _uses(method, ["", *keys[depth:]], parts[depth:], partner):
                        raise NotExact(
                            f"the method {method.name!r} of {type(owner).__name__} uses "
                            f"{'.'.join(keys)!r} too"
                        )

    def unseen(self) -> Iterator[str]:
        for module, found in self._methods.items():
            yield from (f"{type(module).__name__}.{m.name}" for m in found if m.blind)


def _uses(method: _Method, keys: list[str], parts: list[nn.Module], partner: nn.Module) -> bool:
    """Whether a method of parts[0] may use parts[-1], found by the keys, without its partner."""
    for mention in method.mentions:
        for i, (key, part) in enumerate(zip(keys, parts, strict=True)):
            if mention.name != key:
                continue
            if part is parts[-1]:
                # Construction sets conv.weight and puts conv into a list; conv(x) is a use.
                if mention.attribute not in _HARMLESS and (mention.called or not method.builds):
                    return True
            elif mention.attribute is None:  # which is a mention of its own
                opened = not mention.called and all(isinstance(p, _CONTAINERS) for p in parts[i:-1])
                if opened or all(p is not partner for p in part.modules()):
                    return True
    return False


# --- Python's side --------------------------------------------------------------------------------


def methods(module: nn.Module) -> dict[CodeType, str]:
    """The methods of a module that torch knows nothing of, and so never calls."""
    return {
        code: name
        for name, code in _functions(module)
        if name == "__call__" or not (hasattr(nn.Module, name) or name.startswith("__"))
    }


def _functions(module: nn.Module) -> Iterator[tuple[str, CodeType]]:
    """The functions of a module that are not torch's or bnlib's."""
    known = ("builtins", "torch.", "bnlib.")
    own = (vars(cls) for cls in type(module).__mro__ if not cls.__module__.startswith(known))
    for name, value in chain.from_iterable(space.items() for space in (vars(module), *own)):
        for f in (value, *(getattr(value, k, None) for k in ("fget", "func", "__func__"))):
            code = getattr(inspect.unwrap(f) if callable(f) else None, "__code__", None)
            if isinstance(code, CodeType):
                yield name, code


def _method(module: nn.Module, name: str, code: CodeType) -> _Method:
    builds = any(name in _names(c) for n, c in _functions(module) if n == "__init__")
    blind = bool(_names(code) & _BLIND) and not builds and "init" not in _names(code)
    return _Method(name, _mentions(code), builds, blind)


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.cache
def _mentions(code: CodeType, self_name: str | None = None) -> tuple[_Mention, ...]:
    self_name = self_name or next(iter(code.co_varnames[: code.co_argcount]), "self")
    found = []
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("PUSH_NULL", "NOP")]
    for k, step in enumerate(steps):
        after = steps[k + 1] if k + 1 < len(steps) else step
        attribute = after.argval if after.opname.endswith(("_ATTR", "_METHOD")) else None
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            called = step.opname == "LOAD_METHOD" or "NULL" in step.argrepr
            if k < 2 or steps[k - 2].argval != "len":
                found.append(_Mention(step.argval, attribute, called))
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            alone = self_name in (loaded[:-1] if attribute else loaded)
            if alone and steps[k - 1].argval != "len":
                found.append(_Mention("", None, False))
    for const in code.co_consts:
        if isinstance(const, CodeType):
            found += _mentions(const, self_name)
        elif isinstance(const, str) and _names(code) & _BLIND:
            found += [_Mention(part, None, False) for part in const.split(".")]
    if "init" in _names(code):  # torch.nn.init sets weights, wherever it finds them
        found = [mention for mention in found if mention.called]
    return tuple(found)
