"""Frame: the fixed text that a chat template puts around a message's, where it does no more than that. Found out by watching it.

A template's rendering takes longer than all else that is done with a row before the engine. Most templates only put the last
message's text out, some after stripping it; such a row's text is made by joining three strings. A template that looks at the
text in any other way, or may do so where nobody watches, has no frame, and renders every row itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.sight import in_sight

_PROBES = ("\n ' r\"o<b>&{{e}} %s \\ é\u2028 One\t ", " Two {% x %} \\n \u00a0's\n")
"""With what escaping, formatting and changes of case would show in, and space around."""
_HARMLESS = frozenset(
    {
        "__new__", "__init__", "__init_subclass__", "__subclasshook__", "__class__", "__getattribute__", "__setattr__", "__delattr__",
        "__dir__", "__doc__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__sizeof__", "__getstate__",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before and after a message's text, which may be stripped."""

    before: str
    after: str
    strips: bool

    def around(self, text: str) -> str:
        return f"{self.before}{text.strip() if self.strips else text}{self.after}"


class _Watched(str):
    """Text that notes what is done with it. Joined to other text it is still watched."""

    touched: list[str]
    stripped: list[bool]
    whole: bool

    @classmethod
    def of(cls, text: str, touched: list[str], stripped: list[bool], *, whole: bool) -> _Watched:
        made = cls(text)
        made.touched, made.stripped, made.whole = touched, stripped, whole
        return made

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return _Watched.of(str.__add__(self, other), self.touched, self.stripped, whole=False)

    def __radd__(self, other: str) -> str:
        return _Watched.of(str.__add__(other, self), self.touched, self.stripped, whole=False)

    def strip(self, chars: str | None = None) -> str:
        if chars is not None or not self.whole:
            self.touched.append("strip")
        self.stripped.append(True)
        return _Watched.of(str.strip(self, chars), self.touched, self.stripped, whole=self.whole)


def _note(name: str) -> Callable[..., Any]:
    """The method of str, noted."""
    method = getattr(str, name)

    def noted(self: _Watched, *args: Any, **kwargs: Any) -> Any:
        self.touched.append(name)
        return method(self, *args, **kwargs)

    return noted


for _name in dir(str):
    if _name not in _HARMLESS and _name not in vars(_Watched) and callable(getattr(str, _name)):
        setattr(_Watched, _name, _note(_name))


def find_frame(template: str, render: Callable[[str], str]) -> Frame | None:
    """The frame of a template around one message's text; `render` renders a conversation with that text. None where it has none."""
    if not in_sight(template):
        return None
    found = set()
    for probe in _PROBES:
        touched: list[str] = []
        stripped: list[bool] = []
        try:
            text = str.__str__(render(_Watched.of(probe, touched, stripped, whole=True)))
        except Exception:  # whatever a template does not like: it will say so for each row
            return None
        kernel = probe.strip() if stripped else probe
        before, middle, after = text.partition(kernel)
        if touched or not middle or kernel in after:
            return None
        found.add(Frame("".join(before), "".join(after), bool(stripped)))
    return found.pop() if len(found) == 1 else None
