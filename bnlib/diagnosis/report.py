"""What a diagnosis says, and how it prints: as lines of text, or as HTML in a notebook."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_WIDTH = 76  # of the advice, in characters
_NAME = 24  # of a layer's name: the end, which tells more
_MOST = 8  # layers that are printed: those with the largest effect


class Finding(NamedTuple):
    """One thing that is wrong with one batch norm.

    Attributes:
        layer: dotted name of the module, as in ``model.get_submodule(layer)``.
        kind: what it is, one of those that :func:`diagnose` lists.
        evidence: name -> number (or a name), what was measured.
        advice: what to do about it.
        chapter: title of the chapter of the book that derives it.
    """

    layer: str
    kind: str
    evidence: dict[str, int | float | str]
    advice: str
    chapter: str


class LayerReport(NamedTuple):
    """What one batch norm was given, and how far its running statistics are from it.

    ::

        mean_gap  = root mean square over channels of (running_mean - μ)/√(σ² + ε)
        std_ratio = median over channels of √(running_var + ε)/√(σ² + ε)
        effect    = ‖γ (x̂_running - x̂)‖/‖γ x̂‖, over all values of all channels

    μ and σ² are those of all the given data together; None stands where there is nothing to say.

    Attributes:
        name: dotted name of the module.
        shape: of the first input; None if no batch reached the layer.
        values: values per channel in the largest batch.
        effective: how many independent values those are worth, as the median over channels: N
            σ²/Var(a), where a are the means of single samples. Fewer than ``values`` where values
            of a sample are alike, more where its mean varies less than chance would have it. The
            samples are taken to be independent of each other.
        mean_gap: 0 where the running means are right.
        std_ratio: 1 where the running variances are right.
        effect: how much of the layer's output changes between the two modes; 0.1 is a tenth.
        batches_tracked: ``num_batches_tracked``.
        training: the layer's mode, as it was found.
    """

    name: str
    shape: tuple[int, ...] | None
    values: int
    effective: float | None
    mean_gap: float | None
    std_ratio: float | None
    effect: float | None
    batches_tracked: int | None
    training: bool


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; it prints as tables.

    The table of layers has ``values`` and ``effective`` as m and worth, then ``mean_gap``,
    ``std_ratio`` and ``effect``.

    Attributes:
        layers: a :class:`LayerReport` for every batch norm, in the order of ``named_modules``.
        findings: a :class:`Finding` for every fault of a layer, the gravest kind first and within
            a kind the largest.
        batches: how many were run.
    """

    layers: tuple[LayerReport, ...]
    findings: tuple[Finding, ...]
    batches: int

    def __str__(self) -> str:
        parts = [self._head()]
        if self.findings:
            parts.append(_text(("layer", "kind", "evidence"), self._rows(1)))
            for kind, finding in self._kinds():
                said = f"{kind}: {finding.advice} Chapter: {finding.chapter}."
                parts.append(textwrap.fill(said, _WIDTH, subsequent_indent="  "))
        names, rows, rest = self._layers()
        return "\n\n".join([*parts, _text(names, rows) + (f"\n{rest}" if rest else "")])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        names, rows, rest = self._layers()
        parts = [f"<p>{html.escape(self._head())}</p>"]
        if self.findings:
            parts.append(_html(("layer", "kind", "evidence"), self._rows(3)))
            advice = (
                f"<li><strong>{kind}</strong>: {html.escape(f.advice)} Chapter: "
                f"<em>{html.escape(f.chapter)}</em>.</li>"
                for kind, f in self._kinds()
            )
            parts.append(f"<ul>{''.join(advice)}</ul>")
        parts.append(_html(names, rows))
        return "\n".join(parts + ([f"<p>{html.escape(rest)}</p>"] if rest else []))

    def _head(self) -> str:
        found = len(self.findings)
        words = [
            f"{found or 'no'} finding{'' if found == 1 else 's'}",
            f"{len(self.layers)} batch norm{'' if len(self.layers) == 1 else 's'}",
            f"{self.batches} batch{'' if self.batches == 1 else 'es'}",
        ]
        return f"{words[0]} in {words[1]}, {words[2]}"

    def _kinds(self) -> Iterable[tuple[str, Finding]]:
        """Each kind with its first finding, whose advice serves for the others."""
        first: dict[str, Finding] = {}
        for finding in self.findings:
            first.setdefault(finding.kind, finding)
        return first.items()

    def _rows(self, numbers: int) -> list[tuple[str, str, str]]:
        """The findings, and one row for those of a kind that has more than three."""
        rows = []
        for kind, first in self._kinds():
            same = [f for f in self.findings if f.kind == kind]
            shown = same if len(same) <= 3 else [first]
            for f in shown:
                evidence = [f"{k} {_number(v)}" for k, v in list(f.evidence.items())[:numbers]]
                rows.append((_short(f.layer), kind, ", ".join(evidence)))
            if len(same) > len(shown):
                rows.append((f"and {len(same) - 1} more", kind, ""))
        return rows

    def _layers(self) -> tuple[Sequence[str], list[Sequence[str]], str]:
        worst = sorted(self.layers, key=lambda r: -1.0 if r.effect is None else r.effect)
        chosen = {r.name for r in worst[-_MOST:]}
        rows: list[Sequence[str]] = [
            (
                _short(r.name),
                f"{r.values}",
                _number(r.effective),
                _five(r.mean_gap),
                _five(r.std_ratio),
                _five(r.effect),
            )
            for r in self.layers
            if r.name in chosen
        ]
        left = len(self.layers) - len(rows)
        rest = f"and {left} layers with less effect, in .layers" if left else ""
        return ("layer", "m", "worth", "gap", "ratio", "effect"), rows, rest


def _short(name: str) -> str:
    name = name or "(the model)"
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _number(value: float | str | None) -> str:
    """Two digits of what was measured, all of what was set."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return _short(value)
    if isinstance(value, int) or len(repr(value)) <= 6:
        return str(value)
    if 0 < value < 1e-3:
        return "<0.001"
    if 100 <= value < 1e6:
        return f"{float(f'{value:.2g}'):.0f}"
    return f"{value:#.2g}"


def _five(value: float | None) -> str:
    """The number in five signs, for which a telephone has room in each column."""
    return _number(f"{value:.3f}" if value is not None and value < 0.1 else value)


def _text(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _html(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(word)}</td>' for word in row)}</tr>" for row in rows
    )
    return (
        f'<table class="table results"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )
