"""Make a folder of built pages light, in place. It needs what Sphinx has written, and no Sphinx.

    python -m tools.lean _build/html

The dozen style sheets become one that holds only the rules that some page can match; the scripts
become one that does not block the page; the icon and KaTeX fonts keep only the glyphs in use;
pictures become WebP, are loaded when they come near, and have their size in the page, so that
nothing jumps; what the browser need not lay out at once waits (see `far_blocks.py`). Nothing of
what a reader sees changes.
"""
